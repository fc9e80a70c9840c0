"""A detection task that asks to stop in a hook, as a signal would."""

import signal

from umae_jax.tasks.detection import Task
from umae_jax.training.task import Hook


class Stops(Task):
    """Asks to stop at a step. It has no other hooks, so that no evaluation is compiled."""

    def __init__(self, config, stop, step):
        super().__init__(config)
        self.stop, self.step = stop, step

    def hooks(self, context):
        def ask(step, params):
            if step == self.step:
                self.stop.received = signal.SIGTERM
            context.check()
            return {}

        return [Hook(self.step, ask)]
