"""A rank of `turnout doctor` whose engine forgets that DeepSpeed divides by the number of ranks."""

from torch import Tensor

import turnout.training.engine.build
from turnout.launch.commands.doctor_worker import main
from turnout.training.engine.engine import Engine


class ForgetfulEngine(Engine):
    def backward(self, loss: Tensor) -> None:
        super().backward(loss / self._groups.layout.dp)


if __name__ == "__main__":
    turnout.training.engine.build.Engine = ForgetfulEngine  # type: ignore[misc]
    main()
