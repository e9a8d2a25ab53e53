"""Facts pinned: overrides nest and name what they refuse; 3.0 is an int, 3.5 and True are not;
where a field may be one of several dataclasses, the names given choose, and the words given where
all have the same names; a mapping makes a dataclass where there was none, in lists too."""

import dataclasses
from typing import Literal

import pytest

from flowloom.config import check, override, parse_assignments, to_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 1e-3
    warmup_frac: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 10
    kinds: tuple[str, ...] = ("single",)
    mode: Literal["fast", "slow"] = "fast"
    optimizer: Optimizer = Optimizer()

    def __post_init__(self):
        check(self.steps > 0, "steps", self.steps, "> 0")


def test_nested_fields_are_replaced_and_the_rest_stays():
    config = override(Config(), {"steps": 3.0, "optimizer": {"lr": 1, "warmup_frac": 0.1}})
    assert config == Config(steps=3, optimizer=Optimizer(lr=1.0, warmup_frac=0.1))
    assert isinstance(config.steps, int)
    assert override(config, {"optimizer": {"warmup_frac": None}}).optimizer.warmup_frac is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum:
    beta: float = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Either:
    optimizer: Optimizer | Momentum = Optimizer(lr=0.5)


def test_the_names_given_choose_among_several():
    momentum = override(Either(), {"optimizer": {"beta": 1}})
    assert momentum == Either(optimizer=Momentum(beta=1.0))
    assert override(momentum, to_dict(Either())) == Either()
    assert override(Either(), {"optimizer": {"warmup_frac": 0.1}}).optimizer == Optimizer(
        lr=0.5, warmup_frac=0.1
    )
    with pytest.raises(ValueError, match=r"optimizer.gamma: unknown field, expected one of lr"):
        override(Either(), {"optimizer": {"gamma": 1}})
    with pytest.raises(ValueError, match=r"optimizer: got 3, expected a mapping"):
        override(Either(), {"optimizer": 3})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cat:
    weight: float
    kind: Literal["cat"] = "cat"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dog:
    weight: float = 9.0
    kind: Literal["dog"] = "dog"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Home:
    pets: tuple[Cat | Dog, ...] = ()
    owner: str | Dog = "nobody"
    guard: Dog | None = None


def test_words_choose_and_mappings_make_dataclasses():
    pets = [{"kind": "dog"}, {"kind": "cat", "weight": 4}, Dog(weight=1.0)]
    config = override(Home(), {"pets": pets, "owner": {"weight": 2}, "guard": {}})
    assert config.pets == (Dog(), Cat(weight=4.0), Dog(weight=1.0))
    assert (config.owner, config.guard) == (Dog(weight=2.0), Dog())
    assert override(Home(), to_dict(config)) == config
    assert override(config, {"owner": "me", "guard": None}) == Home(pets=config.pets, owner="me")
    for changes, message in (
        ({"pets": [{"kind": "cat"}]}, r"pets\[0\].weight: got None, expected a value"),
        ({"pets": [{"kind": "cow", "weight": 1}]}, r"pets\[0\].kind: got 'cow', expected one of"),
        ({"guard": {"age": 3}}, "guard.age: unknown field"),
        ({"guard": 3}, "guard: got 3, expected a mapping of fields"),
        ({"owner": 3}, "owner: got 3, expected a str"),
    ):
        with pytest.raises(ValueError, match=message):
            override(Home(), changes)


def test_lists_become_tuples_and_come_back_as_lists():
    config = override(Config(), {"kinds": ["two", "counting"]})
    assert config.kinds == ("two", "counting")
    assert to_dict(config)["kinds"] == ["two", "counting"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 1}, "stepz: unknown field"),
        ({"optimizer": {"rate": 1}}, "optimizer.rate: unknown field"),
        ({"steps": 3.5}, "steps: got 3.5, expected an integer"),
        ({"steps": True}, "steps: got True"),
        ({"steps": 0}, "steps: got 0, expected > 0"),
        ({"kinds": [1]}, r"kinds\[0\]: got 1"),
        ({"kinds": "two"}, "kinds: got 'two', expected a list"),
        ({"mode": "medium"}, "mode: got 'medium', expected one of"),
    ],
)
def test_a_bad_override_names_field_value_and_bound(changes, message):
    with pytest.raises(ValueError, match=message):
        override(Config(), changes)


def test_assignments_nest_and_read_json_values():
    parsed = parse_assignments(["steps=3", "optimizer.lr=1e-4", "optimizer.x=null", "mode=slow"])
    assert parsed == {"steps": 3, "optimizer": {"lr": 1e-4, "x": None}, "mode": "slow"}
    with pytest.raises(ValueError, match="expected field=value"):
        parse_assignments(["steps"])
