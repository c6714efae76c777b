"""attribute: a model, one of its answers, its input → what the answer rests on.

One file per method; the table names them all.
"""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from attar.attribute.grad_cam import GradCam
from attar.attribute.input_x_gradient import InputXGradient
from attar.attribute.integrated_gradients import IntegratedGradients
from attar.attribute.kernel_shap import KernelShap
from attar.attribute.lime import Lime
from attar.attribute.occlusion import Occlusion
from attar.attribute.question import Question
from attar.attribute.saliency import Saliency
from attar.attribute.shapley_sampling import ShapleySampling
from attar.attribute.smooth_grad import SmoothGrad

METHODS: dict[str, type[Any]] = {
    "saliency": Saliency,
    "input_x_gradient": InputXGradient,
    "integrated_gradients": IntegratedGradients,
    "smooth_grad": SmoothGrad,
    "grad_cam": GradCam,
    "occlusion": Occlusion,
    "lime": Lime,
    "kernel_shap": KernelShap,
    "shapley_sampling": ShapleySampling,
}
"""File name in this folder to the settings that hold its method."""


@runtime_checkable
class Method(Protocol):
    """What every method is: settings that can be called.

    Attributes:
        complete: Whether the parts sum to f(x) − f(x').
    """

    complete: bool

    def __call__(self, question: Question, /) -> Tensor:
        """Explain; in the shape of the question's map."""
