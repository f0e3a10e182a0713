"""What a message about a wrong name says: the nearest valid one, and all of them."""

import sys

import pytest

from leaveout.errors import COMPARED, NAMED, UnsupportedError, choices, meant, needs, refuse_other_names
from leaveout.methods.registry import METHODS, parse


@pytest.mark.parametrize(
    ("given", "known", "said"),
    [
        ("defualt", ["default", "paper"], "did you mean 'default'? give one of default, paper"),
        ("Paper", ["default", "paper"], "did you mean 'paper'? give one of default, paper"),
        ("x", ["default", "paper"], "give one of default, paper"),
        ("int3", ["int4", "int8"], "give one of int4, int8"),  # another number is no slip of the hand
        (7, ["default"], "give one of default"),
        ("lss", ["loss"], "did you mean 'loss'? give one of loss"),
        ("x", [], "give none"),
    ],
)
def test_choices_name_the_nearest_and_the_valid(given, known, said):
    assert choices(given, known) == said


def test_choices_say_what_else_is_valid():
    assert choices("los", ["loss"], "a function") == "did you mean 'loss'? give one of loss or a function"
    assert choices("los", [], "a function") == "give a function"


def test_choices_list_some_of_many_names_and_look_at_more():
    names = [f"unit-{letter}{other}" for letter in "abcdefghij" for other in "klmnopqrst"]
    said = choices("unit-jtt", names)
    assert said.startswith("did you mean 'unit-jt'? give one of unit-ak, ") and "unit-jt," not in said
    assert said.endswith(f"and {len(names) - NAMED} more")


def test_the_nearest_name_is_looked_for_among_the_first():
    names = (["far"] * COMPARED) + ["exact"]
    assert meant("exat", names[-1:]) == "did you mean 'exact'? " and meant("exat", names) == ""


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match=r"There is no setting 'worker': did you mean 'workers'\? give one of workers"):
        refuse_other_names("setting", {"worker": 2}, ["workers", "seed"])
    with pytest.raises(TypeError, match="There is no option 'b': give one of a"):
        refuse_other_names("option", {"a": 1, "b": 2}, ["a"])


@pytest.mark.parametrize(
    ("name", "near"), [("defualt", "default"), ("ekfac", "ek-fac"), ("gradient-dot", "gradient dot")]
)
def test_a_mistyped_method_is_told_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"did you mean '{near}'") as caught:
        parse(name)
    listed = list(METHODS)[:NAMED]
    assert all(method in str(caught.value) for method in listed) and f"{len(METHODS) - NAMED} more" in str(caught.value)


def test_a_package_that_is_missing_is_named_with_what_brings_it(monkeypatch):
    assert needs("json.decoder", "This").JSONDecoder
    monkeypatch.setitem(sys.modules, "absent", None)
    with pytest.raises(UnsupportedError, match=r"^A page needs the package absent: pip install 'leaveout\[ui\]'\.$"):
        needs("absent", "A page", extra="ui")
    with pytest.raises(UnsupportedError, match=r"^A page needs the package absent: pip install absent==1\.$"):
        needs("absent.part", "A page", pip="absent==1")
