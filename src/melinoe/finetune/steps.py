"""Where our own steps stand between the Trainer's: measuring, saving, skipping, stopping."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from melinoe.finetune.trainer import LocalityTrainer


class Steps(TrainerCallback):
    """Calls the trainer at its turns, and tells the Trainer when to measure, save and stop."""

    def __init__(self, trainer: "LocalityTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the parts in the wrapped model, and measure before the first step."""
        self.trainer.find_parts_again()
        state.logging_steps = args.logging_steps  # a checkpoint brings its own
        if self.trainer.held_out and state.global_step == 0:
            self.trainer.evaluate()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the objective where the run stands."""
        self.trainer.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are complete and unused: a bad step is found out here."""
        self.trainer.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide what follows the step."""
        settings, trainer = self.trainer.settings, self.trainer
        step, last = state.global_step, state.global_step >= state.max_steps

        def turn(every: int | None) -> bool:
            return every is not None and step % every == 0

        if trainer.held_out and (last or turn(settings.eval_every)):
            control.should_evaluate = True
        trainer.stopped = trainer.stopped and not last
        if trainer.stopped:
            control.should_training_stop = True
        # After a bad step the weights are those of a checkpoint before, or what made it bad.
        good = not trainer.bad_in_a_row
        due = last or trainer.stopped or (good and turn(settings.save_every))
        control.should_save = due and trainer.checkpoints is not None
