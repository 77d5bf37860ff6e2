"""Pictures show every letter of the names in them, or say which one it was."""

import warnings

from lightspan.core.drawing import canvas, png, with_letters


def test_letters_without_a_font_are_escaped_and_all_others_stay() -> None:
    shown, families = with_letters("é ± Ж\n")
    assert shown == "é ± Ж\n"
    assert families[0] == "DejaVu Sans"
    shown, _ = with_letters("\U0010fffe x")  # no font has what is no letter
    assert shown == "\\U0010fffe x"


def test_a_picture_with_any_names_is_drawn_without_warnings() -> None:
    figure, ((axes,),) = canvas("猫 and 犬")
    axes.plot([0, 1], [0, 1], label="x")
    (label,) = axes.legend().get_texts()
    label.set_text("고양이 🐈 \U0010fffe")
    axes.set_xticks([0, 1], ["बिल्ली", "แมว"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert png(figure).startswith(b"\x89PNG")
    assert label.get_text().endswith(r"\U0010fffe")


def test_a_name_with_dollars_is_no_formula_and_the_numbers_of_a_logarithmic_axis_are() -> None:
    name = r"$\frac$"
    figure, ((left, middle, right),) = canvas(name, panels=(1, 3))
    left.plot([1, 1000], [0, 1], label=name)
    left.set(xscale="log", ylabel=name)
    left.legend()
    middle.barh([name, "b"], [1, 2])
    right.set_xticks([0, 1], [name, "b"])
    assert png(figure).startswith(b"\x89PNG")
    assert left.get_xticklabels()[2].get_parse_math()
