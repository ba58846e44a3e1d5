"""What a trainer does around its rounds: log, look, save, stop, and in the end publish."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator

from burnish.algorithms import ALGORITHMS
from burnish.errors import RewardError
from burnish.report import describe
from burnish.trainers.look import Watched, look, published
from burnish.trainers.progress import Progress
from burnish.trainers.run import stoppable


@runtime_checkable  # for beartype, under test
class Running(Watched, Protocol):
    """A session that can be trained round by round, and saved."""

    accelerator: Accelerator

    def state(self) -> dict[str, Any]: ...


def run_rounds(session: Running, one_round: Callable[[Any], Mapping[str, float]]) -> Path:
    """Run to the end and return the run's directory; exits 130 / 143 after saving when it is interrupted; what
    was learnt before a reward fails is saved."""
    run, config = session.run, session.config
    with stoppable() as stop, Progress(config.rounds, run, session.accelerator, session.round) as progress:
        if session.round == 0:
            progress.log(0, look(session))
        while session.round < config.rounds and not (session.stopper and session.stopper.done):
            try:
                metrics = one_round(session)
            except RewardError:
                if session.round:  # what was learnt is not lost with the reward
                    run.save(session.round, session.state(), config.checkpoint_keep)
                    progress.say(
                        f"saved round {session.round}; mend it, and go on with `burnish resume {run.directory}`"
                    )
                raise
            session.round += 1
            progress.log(session.round, {**metrics, **look(session)})
            last = session.round == config.rounds
            # Agreed on, because a signal reaches the processes at different moments, maybe in different rounds.
            told: Any = session.accelerator.gather(
                torch.tensor([stop.requested or 0], device=session.accelerator.device)
            )
            asked = int(told.max())
            if last or asked or session.round % config.checkpoint_every == 0:
                run.save(session.round, session.state(), config.checkpoint_keep)
            if asked and not last:
                progress.say(f"stopped after round {session.round}; go on with `burnish resume {run.directory}`")
                raise SystemExit(asked)
        if run.writes:
            with session.policy.weights(published(session)):
                run.publish(session.policy.save(run.clear_aside()))
            row = ALGORITHMS[config.algorithm]
            prompt = None if session.held_out else session.prompts[0]["prompt"]
            sides = {name: side for name, side in zip(("height", "width"), config.size, strict=True) if side}
            call = session.policy.call_options(config.evaluation.guidance) | sides
            describe(run.directory, title=row.title, paper=row.paper, prompt=prompt, call=call)
    return run.directory
