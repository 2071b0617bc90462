import uuid

import pytest

from block.predictor.shared_memory import snapshot_path


@pytest.fixture
def shm_name():
    """A name of this test's own in shared memory; what it leaves there is removed."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    yield name
    snapshot_path(name).unlink(missing_ok=True)
