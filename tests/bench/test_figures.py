"""Films of drawn people: labels show in nothing but what is done."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from bench import figures
from bench.figures import ACTIONS, BACK, FPS, SETS, Person, backgrounds, draw

COLOURS = ((200, 160, 140), (250, 40, 40), (240, 210, 30), (20, 20, 40))


def person(action: str, phase: float) -> Person:
    return Person(64.0, 90.0, 70.0, *COLOURS, [action], [phase])


@pytest.mark.parametrize("action", list(ACTIONS))
def test_a_box_holds_the_person_and_tells_nothing_of_the_action(action: str) -> None:
    black, seen = np.zeros((96, 128, 3), np.uint8), np.zeros((96, 128), bool)
    for phase, time in itertools.product((0.0, 2.0), np.arange(FPS) / FPS):
        drawn, (box,) = draw(black, [person(action, phase)], float(time))
        assert box == draw(black, [person("stand", 0.0)], 0.0)[1][0]
        seen |= drawn.any(2)
    x1, y1, x2, y2 = (round(share * side) for share, side in zip(box, (128, 96, 128, 96), strict=True))
    assert seen[y1:y2, x1:x2].sum() > 0.9 * seen.sum()
    rows, columns = np.nonzero(seen)
    # Also the smallest extent of all, that of who stands, is most of the box.
    assert (columns.max() - columns.min()) * (rows.max() - rows.min()) > 0.5 * (x2 - x1) * (y2 - y1)


def test_actions_are_told_apart_by_what_moves() -> None:
    """In some phase each pair of actions looks different; those that stand still are the same in all frames."""
    black = np.zeros((96, 128, 3), np.uint8)

    def film(action: str) -> np.ndarray:
        return np.stack([draw(black, [person(action, 1.0)], time / FPS)[0] for time in range(FPS)])

    films = {action: film(action) for action in ACTIONS}
    for one, two in itertools.combinations(films, 2):
        assert (films[one] != films[two]).any()
    assert {action for action, shown in films.items() if (shown == shown[:1]).all()} == {"stand", "reach"}


def test_backgrounds_of_films_to_judge_by_are_not_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    shown = [np.full((160, 210, 3), number, np.uint8) for number in range(30)]
    monkeypatch.setattr(figures, "load_background", lambda path: shown)

    def numbers(part: str, seed: int) -> Iterator[int]:
        return (int(one.max()) for one in backgrounds([tmp_path], part, np.random.default_rng(seed), 50))

    parts = {part: {number for seed in range(2) for number in numbers(part, seed)} for part in ("train", "val")}
    assert parts == {"train": set(range(20)), "val": set(range(20, 30))}


def test_labels_of_each_set() -> None:
    alone, others, before = (SETS[kind](np.random.default_rng(1)) for kind in ("alone", "others", "before"))
    assert alone.labels[2] == [[one.actions[2]] for one in alone.people]
    for second, own in enumerate(others.labels):
        one, two = (each.actions[second] for each in others.people)
        same = "together" if one == two else "apart"
        assert own == [[one, same], [two, same]]
    (someone,) = before.people
    assert before.labels[BACK - 1] == [[someone.actions[BACK - 1]]]
    assert before.labels[BACK + 3] == [[someone.actions[BACK + 3], f"{someone.actions[3]} before"]]
