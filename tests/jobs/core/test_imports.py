"""Importing without garbage collections leaves the collector as it was."""

import gc

import pytest

from jobs.core.gc_pause import without_collections


@pytest.mark.parametrize("on", [True, False])
def test_nothing_is_collected_meanwhile_and_what_came_stays(on: bool) -> None:
    was_on, frozen = gc.isenabled(), gc.get_freeze_count()
    (gc.enable if on else gc.disable)()
    try:
        with pytest.raises(ImportError, match="no_such_module"), without_collections():
            assert not gc.isenabled()
            kept = [[] for _ in range(1000)]
            import no_such_module  # noqa: F401
        assert gc.isenabled() is on and gc.get_freeze_count() >= frozen + len(kept)
    finally:
        (gc.enable if was_on else gc.disable)()
