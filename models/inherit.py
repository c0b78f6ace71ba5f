"""Weight inheritance: a LiT student starts from all of its teacher but the linear attention.

Of the self-attention, a class-conditional student takes nothing and a text-to-image student the
output projection alone (arXiv 2501.12976, section 4.3: loading Q, K or V hurts).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from diffusers import ModelMixin

from litapp.models.dit import LiTDiTTransformer2DModel

SELF_ATTENTION = ".attn1."
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


@dataclass(frozen=True)
class Inheritance:
    """Tensor names: taken from the teacher, fresh in the student, left in the teacher."""

    inherited: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]


def inherit(
    student: ModelMixin, teacher: ModelMixin, projections: Collection[str] | None = None
) -> Inheritance:
    """Copy the teacher's weights into ``student``, in place.

    Args:
        student, teacher: two models of one family, class-conditional or text-to-image.
        projections: which of :data:`PROJECTIONS` of the self-attention are taken too; None is the
            paper's rule for the family.

    Raises:
        ValueError: the teacher is of the other family, lacks a tensor or has it in another shape;
            nothing is copied.
    """
    class_conditional = isinstance(student, LiTDiTTransformer2DModel)
    if class_conditional != isinstance(teacher, LiTDiTTransformer2DModel):
        raise ValueError("one of the two is class-conditional and the other is text-to-image")
    if projections is None:
        projections = () if class_conditional else ("to_out",)
    target, source = student.state_dict(), teacher.state_dict()
    wanted = [name for name in target if _is_inherited(name, projections)]
    for name in wanted:
        if name not in source:
            raise ValueError(f"the teacher has no tensor {name}")
        if source[name].shape != target[name].shape:
            raise ValueError(
                f"{name} is {tuple(source[name].shape)} in the teacher "
                f"and {tuple(target[name].shape)} in the student"
            )
    student.load_state_dict({name: source[name] for name in wanted}, strict=False)
    taken = set(wanted)
    return Inheritance(
        inherited=tuple(wanted),
        fresh=tuple(name for name in target if name not in taken),
        dropped=tuple(name for name in source if name not in taken),
    )


def _is_inherited(name: str, projections: Collection[str]) -> bool:
    _, inside, rest = name.partition(SELF_ATTENTION)
    return not inside or rest.split(".")[0] in projections
