import uuid

import msgspec
import pytest

from block.emulate.config import EmulateConfig
from block.engine.limits import EngineLimits

from .served import PROFILE


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a profile with steps of a millisecond or two."""
    path = tmp_path_factory.mktemp("profile") / "test.json"
    path.write_bytes(msgspec.json.encode(PROFILE))
    return str(path)


@pytest.fixture
def shm_name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def config(profile: str) -> EmulateConfig:
    return EmulateConfig(limits=EngineLimits(), profile=profile, models=("tiny",))
