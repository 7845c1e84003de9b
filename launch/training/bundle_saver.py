"""Saves the bundle after a validation, and checks what was saved."""

from __future__ import annotations

from dataclasses import dataclass

from lavic.launch.training.stage import TrainingRun, TrainingStage
from lavic.train.bundle_check import check_bundle
from lavic.train.callbacks.callback import Callback
from lavic.train.evaluation import EvalResult
from lavic.train.run_folder import write_on_rank_0
from lavic.train.trainer import Trainer


@dataclass(frozen=True)
class BundleSaver(Callback):
    """Saves the adapter of the best validation, or the last one; it comes after `BestModel`."""

    stage: TrainingStage
    run: TrainingRun

    def post_eval(self, trainer: Trainer, result: EvalResult) -> None:
        """Saves where the adapter is the chosen one for now. Collective.

        Raises:
            LavicError: The bundle cannot be written, or differs from the model.
        """
        stage, run, state = self.stage, self.run, trainer.state
        chosen = trainer.done if stage.settings.select == "last" else state.step == state.best_step
        chosen &= state.step > 0
        if chosen:
            trainer.enter_phase(f"the bundle after step {state.step}")
            components, bundle = run.components, run.folder.bundle
            components.weights = trainer.engine.full_precision_weights()
            write_on_rank_0(bundle, lambda: stage.save_bundle(bundle, components), run.world)
            check_bundle(
                bundle, components.model, components.task, components.valid, run.world, vision=components.vision
            )
        stage.post_eval(run, state.step, result, chosen)
