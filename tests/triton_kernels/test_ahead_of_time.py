"""Results of compilations are kept under a key that changes with everything they follow from."""

import ahead_of_time
import pytest
from ahead_of_time import Spec, key_of

SPEC = Spec("backproject_update:backproject_update_kernel", {"x_ptr": "*fp32"}, {"BLOCK": 16}, options={"num_warps": 4})


@pytest.mark.parametrize("module", ["backproject_update", "rounding", "launch"])
def test_a_change_of_any_source_that_the_kernel_calls_gives_another_key(monkeypatch, module):
    before, read = key_of(SPEC, "sm_90"), ahead_of_time.source_of
    changed = f"lightspan.triton_kernels.{module}"
    monkeypatch.setattr(
        ahead_of_time, "source_of", lambda name: read(name) + b"\n# changed" if name == changed else read(name)
    )
    assert key_of(SPEC, "sm_90") != before


def test_a_change_elsewhere_does_not(monkeypatch):
    before, read = key_of(SPEC, "sm_90"), ahead_of_time.source_of
    monkeypatch.setattr(
        ahead_of_time, "source_of", lambda name: b"changed" if name.endswith(".walsh_hadamard") else read(name)
    )
    assert key_of(SPEC, "sm_90") == before


def test_target_constants_types_and_options_are_parts_of_the_key():
    others = [
        Spec(SPEC.kernel, {"x_ptr": "*bf16"}, SPEC.constants, options=SPEC.options),
        Spec(SPEC.kernel, SPEC.types, {"BLOCK": 32}, options=SPEC.options),
        Spec(SPEC.kernel, SPEC.types, SPEC.constants, options={"num_warps": 8}),
    ]
    keys = {key_of(SPEC, "sm_90"), key_of(SPEC, "sm_80"), *(key_of(other, "sm_90") for other in others)}
    assert len(keys) == 5
