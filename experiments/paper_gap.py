"""What moves our capacities towards or away from the published ones: one choice of the setting at a time.

The publication measured a real cluster; which of its facts matter? Each line changes one thing of paper-default.toml: the
step times, the factor on them, what is left out as warm-up, how old the state is that a decision sees and how long the
decision takes to arrive (published prototype: state polled for each request, 62-80 ms a prediction, nothing remembered
between requests), and the load generator's own lateness (it sleeps between requests, so that the rate it offers is below the
one asked for: a gap of 1/q becomes 1/q + lateness).
"""

import asyncio
import random
import time

import msgspec

import paper
from block.simulate import SimulationConfig
from block.simulate.config import GatewayModel, LengthModel
from block.simulate.sweep import varied
from block.steptime.profile import StepTimeProfile

LINEAR = StepTimeProfile(
    name="a30-llama2-7b-linear", gpu="NVIDIA A30", model="llama2-7b", decode_knots=[(0, 0.016), (64, 0.02336)],
    mixed_knots=[(0, 0.016), (512, 0.07488)], kv_s=5.8e-7, attention_s=3.2e-8,
)  # fmt: skip
OLD_STATE = GatewayModel(snapshot_interval_s=0.05, in_flight_accounting=False, network_s=0.04)
LATE_S = 0.001
CELLS = [("round-robin", "ttft_p99<=10"), ("infaas++", "ttft_p99<=10"), ("llumnix-minus", "ttft_p99<=10"),
         ("llumnix-minus", "ttft_p99<=3"), ("block-paper", "ttft_p99<=3")]  # fmt: skip


def variants(base: SimulationConfig) -> dict[str, SimulationConfig]:
    def on(profile: str | StepTimeProfile, speed: float) -> SimulationConfig:
        return msgspec.structs.replace(
            base, instances=[msgspec.structs.replace(base.instances[0], profile=profile, speed=speed)]
        )

    return {
        "linear step times, first 10 % left out": msgspec.structs.replace(on(LINEAR, 1.0), warmup_fraction=0.1),
        "linear step times": on(LINEAR, 1.0),
        "imported step times, as they are": on("a30-llama2-7b", 1.0),
        "imported, x 1.05: paper-default.toml": base,
        "the same, first 10 % left out": msgspec.structs.replace(base, warmup_fraction=0.1),
        "the same, state up to 50 ms old, dispatches forgotten, 40 ms to the instance": msgspec.structs.replace(
            base, gateways=OLD_STATE
        ),
        "imported, x 1.035, load generator 1 ms late": on("a30-llama2-7b", 1.035),
    }


def main() -> None:
    o = paper.options(__doc__, seeds=2)
    rows = []
    chosen = variants(paper.setting("default", o))
    for name, config in list(chosen.items())[3 if o.quick else 0 : 4 if o.quick else None]:
        late_s = LATE_S if "late" in name.rsplit(", ", 1)[-1] else 0.0
        cells = []
        for policy, criterion in CELLS:
            seeing = (
                msgspec.structs.replace(config, lengths=LengthModel(options=dict(paper.ESTIMATED)))
                if policy == "block-paper"
                else config
            )
            found = paper.capacity(o, varied(seeing, policy=policy), criterion).capacity_rps
            asked = found / (1 - found * late_s)  # the rate to ask for so that this one is offered
            published = paper.CAPACITY["default", criterion, policy, "estimated" if policy == "block-paper" else ""]
            cells.append(f"{asked:.1f} ({asked / published - 1:+.0%})")
        e2e_s = paper.means(o, varied(config, policy="llumnix-minus"), 30.0 / (1 + 30.0 * late_s))["e2e_s_mean"]
        rows.append([name, *cells, f"{e2e_s:.2f}"])
        print("  ".join(rows[-1]), flush=True)
    published = [f"{paper.CAPACITY['default', c, p, 'estimated' if p == 'block-paper' else '']:g}" for p, c in CELLS]
    rows.append(["published", *published, "10.94"])
    head = [
        "setting",
        *(f"{p}, {c.replace('ttft_p99', 'P99 ').replace('<=', '<= ')} s" for p, c in CELLS),
        "mean E2E of llumnix-minus at 30/s, s",
    ]
    paper.publish(o, "paper_gap", head, rows)
    late_s = asyncio.run(lateness_s(10 if o.quick else 200))
    print(f"asyncio.sleep between requests, 30 a second, on this machine now: {late_s * 1e3:.1f} ms late on average")


async def lateness_s(gaps: int) -> float:
    """How late a loop of ``asyncio.sleep`` is that waits exponential gaps of 1/30 s, as the published load generator does."""
    rng, late_s = random.Random(1), 0.0
    for _ in range(gaps):
        gap_s, began_s = rng.expovariate(30.0), time.perf_counter()
        await asyncio.sleep(gap_s)
        late_s += time.perf_counter() - began_s - gap_s
    return late_s / gaps


if __name__ == "__main__":
    main()
