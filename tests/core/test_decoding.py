"""Decoders in a process of their own: what they answer, how they end, and when another one takes their place."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from waiting import HANG_S

from lightspan.core.decoding import DecoderProcess
from lightspan.core.errors import UserError
from lightspan.core.files.foreign import BYTES, NUMBERS, SECONDS, TooMuchError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a program of a file")
PROGRAM = """
import os, resource, signal, sys
import numpy as np
from lightspan.core.errors import UserError
from lightspan.core.decoding import serve
from lightspan.core.files.foreign import NUMBERS

class Panic(BaseException):
    pass

kept = []

def decode(what, value=None):
    print("decoders may print")
    match what:
        case "echo":
            return {"value": value}, {}
        case "process":
            return {"value": os.getpid()}, {}
        case "arrays":
            return {}, {"a": np.arange(6, dtype=">i2").reshape(2, 3).T, "none": np.empty((0, 3)), "one": np.array(2.5)}
        case "large":
            return {}, {"a": np.arange(10**6)}
        case "panic":
            raise Panic("first line\\nindex (0xab12) out of range")
        case "user":
            NUMBERS.require(NUMBERS.most)
            raise UserError(f"install something, {NUMBERS.most}")
        case "crash":
            os.abort()
        case "leave":
            os._exit(3)
        case "keep":
            kept.append(b"x" * (2**28 + 2**25))
            return {}, {}
        case "memory":
            np.ones(2**40)
        case "limits":
            seconds = signal.getitimer(signal.ITIMER_PROF)[1]
            return {"seconds": seconds, "bytes": resource.getrlimit(resource.RLIMIT_AS)[0]}, {}
        case "last resort":
            os.kill(os.getpid(), signal.SIGVTALRM)

def opened():
    if "wanting" in __file__:
        raise UserError("install something")
    return decode

if "broken" in __file__:
    sys.exit(5)
serve(opened)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("decoders")
        patch.setenv("PYTHONPATH", str(folder))
        yield folder


@pytest.fixture
def decoder(folder: Path, request: pytest.FixtureRequest) -> DecoderProcess:
    name = f"decodes_{getattr(request, 'param', 'well')}"
    (folder / f"{name}.py").write_text(PROGRAM)
    return DecoderProcess(name)


def process_of(decoder: DecoderProcess) -> int:
    answer, _ = decoder.ask(what="process")
    found: int = answer["value"]
    return found


def test_answers_and_arrays_arrive_as_they_were(decoder: DecoderProcess) -> None:
    assert decoder.ask(what="echo", value="a\n\udcff é")[0] == {"value": "a\n\udcff é"}
    _, arrays = decoder.ask(what="arrays")
    assert arrays["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert arrays["a"].dtype == ">i2"
    assert arrays["a"].flags.writeable
    assert arrays["none"].shape == (0, 3)
    assert arrays["one"] == 2.5
    assert np.array_equal(decoder.ask(what="large")[1]["a"], np.arange(10**6))


def test_what_decoding_raises_is_wrong_with_the_file_and_what_a_user_can_mend_stays_so(
    decoder: DecoderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^index  out of range$"):
        decoder.ask(what="panic")
    first = process_of(decoder)
    for most in (7, 9, NUMBERS.default):  # of the process that asks, when it asks
        monkeypatch.setenv(NUMBERS.setting, str(most))
        if most == NUMBERS.default:
            monkeypatch.delenv(NUMBERS.setting)
        with pytest.raises(UserError, match=f"install something, {most}"):
            decoder.ask(what="user")
    assert process_of(decoder) == first


def test_a_file_that_ends_its_decoder_is_damaged_and_the_next_one_is_read(decoder: DecoderProcess) -> None:
    for what, said in (("crash", "SIGABRT"), ("leave", "status 3"), ("crash", "SIGABRT")):
        with pytest.raises(ValueError, match=rf"{said}.*damaged"):
            decoder.ask(what=what)
        assert decoder.ask(what="echo", value=1)[0] == {"value": 1}


def test_a_process_that_someone_else_has_ended_is_no_fault_of_the_next_file(decoder: DecoderProcess) -> None:
    first = process_of(decoder)
    os.kill(first, 15)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert process_of(decoder) != first


def test_an_interrupt_leaves_it_to_the_process_that_asks(decoder: DecoderProcess) -> None:
    first = process_of(decoder)
    os.kill(first, 2)
    assert process_of(decoder) == first


def test_a_process_that_keeps_much_gives_way_to_a_fresh_one(decoder: DecoderProcess) -> None:
    first = process_of(decoder)
    decoder.ask(what="keep")
    assert not Path(f"/proc/{first}").exists()
    assert process_of(decoder) != first


def test_time_and_memory_are_limited(decoder: DecoderProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS.setting, "7")
    answer, _ = decoder.ask(what="limits")
    assert answer["seconds"] == 7
    assert BYTES.most < answer["bytes"] < 2 * BYTES.most
    for what, setting in (("memory", BYTES), ("last resort", SECONDS)):
        with pytest.raises(TooMuchError, match=setting.setting):
            decoder.ask(what=what)


@pytest.mark.parametrize("decoder", ["wanting", "broken"], indirect=True)
def test_a_program_that_does_not_start_is_no_fault_of_the_file(decoder: DecoderProcess) -> None:
    with pytest.raises(UserError, match=r"install something|status 5.*decodes_broken"):
        decoder.ask(what="echo")


def test_threads_take_turns(decoder: DecoderProcess) -> None:
    found: list[bool] = []

    def ask(number: int) -> None:
        found.extend(decoder.ask(what="echo", value=number)[0]["value"] == number for _ in range(50))

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=HANG_S)
    assert found == [True] * 200


def test_a_fork_asks_a_process_of_its_own(decoder: DecoderProcess) -> None:
    first = process_of(decoder)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, str(process_of(decoder)).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(read, 100)) not in (first, child, os.getpid())
    assert process_of(decoder) == first
