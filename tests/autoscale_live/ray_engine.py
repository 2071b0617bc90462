"""An application for Ray Serve that stands for an engine."""

from ray import serve


@serve.deployment(name="engine", num_replicas=1, ray_actor_options={"num_cpus": 0.1})
class Engine:
    async def __call__(self, _request: object) -> str:
        return "ok"


app = Engine.bind()
