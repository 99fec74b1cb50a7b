"""Meta-World as far as it is known without importing it, which takes a third of a second.

`tests/envs/test_envs.py` compares this with what is installed.
"""

from __future__ import annotations

import numpy as np
from gymnasium.spaces import Box

OBSERVATION_SPACE = Box(-np.inf, np.inf, (39,), np.float32)
"""18 numbers of now, the same 18 of the step before, and the goal [metres, quaternions]."""
ACTION_SPACE = Box(-1.0, 1.0, (4,), np.float32)
"""Displacement of the hand (x, y, z) and the gripper's effort, each as a fraction of its limit."""

MAX_STEPS = 500
"""Steps of an episode after which Meta-World's environments refuse to go on."""

MT50 = tuple(
    """
    assembly-v3 basketball-v3 bin-picking-v3 box-close-v3 button-press-topdown-v3
    button-press-topdown-wall-v3 button-press-v3 button-press-wall-v3 coffee-button-v3
    coffee-pull-v3 coffee-push-v3 dial-turn-v3 disassemble-v3 door-close-v3 door-lock-v3
    door-open-v3 door-unlock-v3 hand-insert-v3 drawer-close-v3 drawer-open-v3 faucet-open-v3
    faucet-close-v3 hammer-v3 handle-press-side-v3 handle-press-v3 handle-pull-side-v3
    handle-pull-v3 lever-pull-v3 pick-place-wall-v3 pick-out-of-hole-v3 pick-place-v3
    plate-slide-v3 plate-slide-side-v3 plate-slide-back-v3 plate-slide-back-side-v3
    peg-insert-side-v3 peg-unplug-side-v3 soccer-v3 stick-push-v3 stick-pull-v3 push-v3
    push-wall-v3 push-back-v3 reach-v3 reach-wall-v3 shelf-place-v3 sweep-into-v3 sweep-v3
    window-open-v3 window-close-v3
""".split()
)
"""All tasks, in Meta-World's order, which is that of the one-hot."""

MT25 = tuple(
    """
    reach-v3 push-v3 pick-place-v3 door-open-v3 drawer-open-v3 drawer-close-v3
    button-press-topdown-v3 peg-insert-side-v3 window-open-v3 window-close-v3 coffee-pull-v3
    pick-out-of-hole-v3 disassemble-v3 pick-place-wall-v3 basketball-v3 stick-pull-v3
    button-press-wall-v3 faucet-open-v3 door-lock-v3 lever-pull-v3 sweep-into-v3
    faucet-close-v3 coffee-button-v3 button-press-topdown-wall-v3 dial-turn-v3
""".split()
)

MT10 = tuple(
    """
    reach-v3 push-v3 pick-place-v3 door-open-v3 drawer-open-v3 drawer-close-v3
    button-press-topdown-v3 peg-insert-side-v3 window-open-v3 window-close-v3
""".split()
)
