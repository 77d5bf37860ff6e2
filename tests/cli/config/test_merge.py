from hypothesis import given
from hypothesis import strategies as st

from lightspan.cli.config.merge import explain, merge, merge_layers, without_removed
from lightspan.cli.config.tree import parse, plain, walk, wrap
from lightspan.core.errors import WarningNote, print_notes

# Layers of one shape: below any path there is a mapping in all of them or in none.
leaves = st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
inner = st.dictionaries(st.sampled_from("xyz"), leaves, max_size=3)
layers = st.fixed_dictionaries({}, optional={"a": leaves, "m": inner, "n": inner})


def layer(text: str, name: str = "f.yaml"):
    return parse(text, name)


@given(layers, layers)
def test_every_value_of_the_later_layer_wins_and_all_others_stay(low, high):
    merged = {path: node.value for path, node in walk(merge(wrap(low, "low"), wrap(high, "high")))}
    of_high = {path: node.value for path, node in walk(wrap(high, "")) if not isinstance(node.value, dict | list)}
    of_low = {path: node.value for path, node in walk(wrap(low, "")) if not isinstance(node.value, dict | list)}
    assert of_high.items() <= merged.items()
    assert all(
        merged[path] == value
        for path, value in of_low.items()
        if path in merged and path[:1] not in {(k,) for k in high}
    )


@given(layers, layers, layers)
def test_grouping_of_layers_does_not_matter_only_their_order(a, b, c):
    a, b, c = (wrap(data, name) for data, name in ((a, "a"), (b, "b"), (c, "c")))
    assert plain(merge(merge(a, b), c)) == plain(merge(a, merge(b, c)))


@given(layers)
def test_an_empty_layer_and_a_repeated_layer_change_nothing(a):
    assert plain(merge(wrap(a, "a"), wrap({}, "b"))) == a
    assert plain(merge(wrap({}, "b"), wrap(a, "a"))) == a
    assert plain(merge(wrap(a, "a"), wrap(a, "a"))) == a


@given(st.sets(st.sampled_from("abcdef"), min_size=1), st.data())
def test_null_removes_exactly_the_named_callbacks(names, data):
    gone = data.draw(st.sets(st.sampled_from(sorted(names))))
    base = wrap({"trainer": {"callbacks": {name: {"class_path": "x.Y"} for name in names}}}, "base")
    overlay = wrap({"trainer": {"callbacks": dict.fromkeys(gone)}}, "overlay")
    left = plain(without_removed(merge_layers([base, overlay])[0]))["trainer"]["callbacks"]
    assert set(left) == names - gone


def test_null_removes_an_input_of_an_estimator():
    base, overlay = layer("inputs: {a: {class_path: x.Y}, b: {class_path: x.Y}}"), layer("inputs: {a: null}")
    assert plain(without_removed(merge_layers([base, overlay])[0])) == {"inputs": {"b": {"class_path": "x.Y"}}}


def test_null_removes_a_part_that_a_setting_holds_by_name_and_no_setting():
    base = layer(
        "inputs: {a: {class_path: x.Y, init_args: {sides: {l: {class_path: x.A}, r: {class_path: x.B}}, "
        "one: {class_path: x.C, init_args: {d: {class_path: x.D}}}, bands: {k: [1]}}}}"
    )
    overlay = layer("inputs: {a: {init_args: {sides: {l: null}, one: {init_args: {d: null}}, bands: {k: null}}}}")
    merged = plain(without_removed(merge_layers([base, overlay])[0]))["inputs"]["a"]["init_args"]
    assert merged["sides"] == {"r": {"class_path": "x.B"}}
    assert merged["one"] == {"class_path": "x.C", "init_args": {"d": None}}
    assert merged["bands"] == {"k": None}
    whole = layer("inputs: {a: {init_args: {one: null}}}")
    assert plain(without_removed(merge_layers([base, whole])[0]))["inputs"]["a"]["init_args"]["one"] is None


def test_null_elsewhere_is_a_value():
    merged, _ = merge_layers([layer("trainer: {max_time: x}\n"), layer("trainer: {max_time: null}\n")])
    assert plain(without_removed(merged)) == {"trainer": {"max_time": None}}


def test_a_removed_callback_can_come_back_without_its_old_settings():
    base = layer("trainer: {callbacks: {c: {class_path: a.B, init_args: {x: 1}}}}")
    gone = layer("trainer: {callbacks: {c: null}}")
    back = layer("trainer: {callbacks: {c: {class_path: a.B}}}")
    assert plain(merge_layers([base, gone, back])[0]) == {"trainer": {"callbacks": {"c": {"class_path": "a.B"}}}}


def test_a_changed_class_drops_the_old_settings_and_warns_of_it():
    base = layer("model: {class_path: a.Vit, init_args: {depth: 12}}")
    for settings in ("", ", init_args: {}"):
        over = layer(f"\nmodel: {{class_path: a.ResNet{settings}}}", "over.yaml")
        merged, notes = merge_layers([base, over])
        assert plain(merged)["model"].get("init_args", {}) == {}
        assert notes == [
            "over.yaml:2 model: class a.Vit -> a.ResNet without the settings that Vit had: depth=12; give it those "
            "that it shall have"
        ]
        assert isinstance(notes[0], WarningNote)


def test_a_changed_class_with_settings_of_its_own_is_one_short_note():
    base = layer("model: {class_path: a.Vit, init_args: {depth: 12, width: 16, act: relu, bias: true, head: [1]}}")
    own = "\nmodel: {class_path: a.ResNet, init_args: {width: 3}}"
    merged, notes = merge_layers([base, layer(own, "over.yaml")])
    assert plain(merged) == {"model": {"class_path": "a.ResNet", "init_args": {"width": 3}}}
    assert notes == ["over.yaml:2 model: ResNet in place of Vit, without its depth, act, bias and 1 more"]
    assert not isinstance(notes[0], WarningNote)


def test_dropped_settings_are_warned_of_after_all_notes(capsys):
    base = layer("model: {class_path: a.Vit, init_args: {depth: 12, bias: true, head: {class_path: a.B}, act: relu}}")
    other = layer("trainer: {callbacks: {c: {class_path: a.C}}}")
    removed = layer("trainer: {callbacks: {x: null}}")
    _, notes = merge_layers([base, other, layer("model: {class_path: a.ResNet}"), removed])
    print_notes(notes)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("note: ")
    assert last.startswith("warning: ")
    assert "that Vit had: depth=12, bias=true, head, act=relu; " in last


def test_settings_that_are_all_given_anew_are_no_news():
    base = layer("model: {class_path: a.Vit, init_args: {depth: 12}}")
    assert merge_layers([base, layer("model: {class_path: a.ResNet, init_args: {depth: 3}}")])[1] == []


def test_the_same_class_named_again_keeps_its_settings():
    base = layer("model: {class_path: a.Vit, init_args: {depth: 12}}")
    merged, notes = merge_layers([base, layer("model: {class_path: a.Vit, init_args: {width: 3}}")])
    assert plain(merged)["model"]["init_args"] == {"depth": 12, "width": 3}
    assert notes == []


def test_lists_are_replaced_whole():
    merged, _ = merge_layers([layer("a: [1, 2, 3]"), layer("a: [4]")])
    assert plain(merged) == {"a": [4]}


def test_a_value_tells_who_set_it_and_what_it_replaced():
    merged, _ = merge_layers(
        [layer("t: {lr: 1}", "a.yaml"), layer("\nt: {lr: 2}", "b.yaml"), wrap({"t": {"lr": 3}}, "flag")]
    )
    assert [" ".join(line.split()) for line in explain(merged, ("t", "lr")) or []] == [
        "set flag t.lr = 3",
        "before b.yaml:2 t.lr = 2",
        "before a.yaml:1 t.lr = 1",
    ]


def test_a_dropped_setting_tells_that_it_was_dropped():
    layers = [layer("m: {class_path: a.B, init_args: {x: 7}}", "a.yaml"), layer("m: {class_path: a.C}", "b.yaml")]
    lines = explain(merge_layers(layers)[0], ("m", "init_args", "x")) or []
    assert lines[0].startswith("m.init_args.x is not set")
    assert "a.yaml:1" in lines[1]
    assert "= 7" in lines[1]


def test_a_key_that_no_layer_set_has_no_history():
    assert explain(layer("a: 1"), ("b",)) is None


def test_a_null_that_removes_nothing_is_said_with_the_name_that_was_meant():
    layers = (
        {"trainer": {"callbacks": {"checkpoint": {"class_path": "a.B"}}}},
        {"trainer": {"callbacks": {"chekpoint": None}}},
    )
    _, notes = merge_layers([wrap(layer, "here") for layer in layers])
    assert notes == [
        "here trainer.callbacks.chekpoint: null removes nothing, no layer below has it; did you mean checkpoint?"
    ]


RECIPES_OWN = layer("checkpoints: {base: b, first: x, second: y}")


def test_checkpoints_of_other_names_replace_those_of_the_recipe_and_a_note_names_what_is_dropped():
    merged, notes = merge_layers([RECIPES_OWN, layer("checkpoints: {base: mine, task: z}", "o.yaml")])
    assert plain(merged) == {"checkpoints": {"base": "mine", "task": "z"}}
    (note,) = notes
    assert "base, task replace all that were named before; dropped: first, second" in note
    assert "first" in "\n".join(explain(merged, ("checkpoints", "first")) or [])


def test_checkpoints_of_the_same_names_are_changed_one_by_one():
    merged, notes = merge_layers([RECIPES_OWN, layer("checkpoints: {first: z}")])
    assert plain(merged) == {"checkpoints": {"base": "b", "first": "z", "second": "y"}}
    assert notes == []
