import math
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from lightspan.cli.config import tree
from lightspan.cli.config.tree import MAX_BITS, dump, parse, plain, read, walk
from lightspan.core.errors import UserError

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=12,
)


def value_of(text: str) -> object:
    return plain(parse(text, "f.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.0e-3", 1e-3),
        ("-2E+4", -2e4),
        (".5", 0.5),
        ("3", 3),
        ("0x1f", 31),
        ("1_000", 1000),
        ("010", "010"),
        ("true", True),
        ("on", "on"),
        ("yes", "yes"),
        ("~", None),
        ("2024-01-01", "2024-01-01"),
        ("00:01:30:00", "00:01:30:00"),
        ("1:30", "1:30"),
        ("'1e-3'", "1e-3"),
    ],
)
def test_scalars_are_read_as_numbers_only_where_they_look_like_numbers(text, value):
    read_back = value_of(text)
    assert read_back == value
    assert type(read_back) is type(value)


def test_not_a_number_and_infinity_are_numbers():
    assert math.isnan(value_of(".nan"))
    assert value_of("-.inf") == -math.inf


@given(trees)
def test_what_is_dumped_reads_back_as_the_same_data(tree):
    assert plain(parse(dump({"key": tree}), "f.yaml")) == {"key": tree}


@given(st.text(max_size=12))
@example("\x85")
@example("a\u2028b")
def test_other_yaml_readers_see_our_texts_as_texts(text):
    assert yaml.safe_load(dump({"key": text})) == {"key": text}


def test_every_value_knows_its_line():
    root = parse("a: 1\nb:\n  c: x\n  d:\n    - 5\n", "f.yaml")
    assert {".".join(map(str, path)): node.where for path, node in walk(root)} == {
        "": "f.yaml:1",
        "a": "f.yaml:1",
        "b": "f.yaml:2",
        "b.c": "f.yaml:3",
        "b.d": "f.yaml:4",
        "b.d.0": "f.yaml:5",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3 a: duplicate key, first given at f.yaml:1; keep one"),
        ("m:\n  x: 1\n  x: 1\n", "f.yaml:3 m.x: duplicate key"),
        ("a: !!python/object/apply:os.system [id]\n", "the YAML tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("a: !mine 3\n", "the YAML tag '!mine' is refused"),
        ("a: !!binary aGk=\n", "is refused; write plain values"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "f.yaml:3: '<<' is refused; name the other file under base: instead"),
        ("a: [1, 2\nb: 3\n", "f.yaml:2: not YAML"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: not YAML: expected a single document"),
        ("? [1, 2]\n: 3\n", "a key must be text or a whole number"),
        ("null: 3\n", "a key must be text or a whole number"),
    ],
)
def test_refused_yaml_names_file_line_and_key(text, message):
    with pytest.raises(UserError) as error:
        parse(text, "f.yaml")
    assert message in str(error.value)


def test_aliases_that_grow_without_bound_end_early():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    with pytest.raises(UserError, match="its aliases expand too far"):
        parse(bomb, "f.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\xff\xfe", "not a YAML file: byte 0 is not UTF-8 text"),
        (b"just some words", "its root is the text or number 'just some words', but must be a mapping"),
        (b"- a\n- b\n", "its root is a list, but must be a mapping"),
        (b"%PDF-1.4\n\x01", "not YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["a: !!bool x", "a: !!int x", "a: !!float x", "? !!bool x\n: 1"])
def test_a_tag_that_its_text_does_not_bear_is_placed(text):
    with pytest.raises(UserError, match=r"f\.yaml:1( a)?: 'x' is not a valid (bool|int|float)"):
        parse(text, "f.yaml")


def test_what_is_too_large_is_refused_before_it_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(2**42)  # more than any memory holds
    monkeypatch.setattr(tree._Loader, "get_single_node", None)  # which builds the document
    with pytest.raises(UserError, match=r"large\.yaml: more than 1,048,576 bytes"):
        read(tmp_path / "large.yaml")
    for many in ("a:\n" + "- 1\n" * 250_000, "".join(f"k{i}: 1\n" for i in range(80_000)), "[" * 30_000):
        with pytest.raises(UserError, match=r"more than 20000 values|exceeded maximum nesting|not YAML"):
            parse(many, "f.yaml")


def test_a_missing_file_and_an_empty_file(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone\.yaml: cannot be read: No such file"):
        read(tmp_path / "gone.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert plain(read(tmp_path / "empty.yaml")) == {}


def test_whole_numbers_of_more_digits_than_python_prints_are_refused() -> None:
    for number in (2**MAX_BITS - 1, -(2**MAX_BITS) + 1, 2**64, 0):
        assert plain(parse(f"seed: {number}", "r.yaml"))["seed"] == number
    for text in (str(2**MAX_BITS), str(-(2**MAX_BITS)), "0x" + "f" * 100_000):
        with pytest.raises(UserError, match=r"r\.yaml:1 seed: the whole number .* is beyond 8,192 bits") as refused:
            parse(f"seed: {text}", "r.yaml")
        assert len(str(refused.value)) < 200
