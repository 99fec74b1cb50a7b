"""Descriptions of Meta-World's tasks, and their embeddings."""

import numpy as np

from mtrl.envs.benchmarks import NAMED
from mtrl.policy.descriptions import texts, vectors


def test_every_task_has_a_unique_description():
    assert set(texts()) == set(NAMED["mt50"])
    assert len(set(texts().values())) == 50
    assert all(20 < len(text) < 120 and text.endswith(".") for text in texts().values())


def test_vectors_are_sentence_embeddings_in_the_requested_order():
    tasks = NAMED["mt50"]
    found = vectors(tasks)
    assert found.shape == (50, 384) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
    assert np.array_equal(vectors(tasks[::-1]), found[::-1])
    likeness = found @ found.T - 2 * np.eye(50)
    nearest = {task: tasks[row.argmax()] for task, row in zip(tasks, likeness, strict=True)}
    assert likeness.max() < 1 - 1e-3  # all differ
    assert nearest["window-open-v3"] == "window-close-v3"
    assert nearest["handle-press-v3"] == "handle-press-side-v3"
    assert nearest["drawer-open-v3"] == "drawer-close-v3"


def test_other_tasks_have_none():
    assert vectors(("reach-v3", "mine")) is None
