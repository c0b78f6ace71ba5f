"""Weight inheritance: a LiT student starts from all of its teacher but the linear attention."""

from __future__ import annotations

from dataclasses import dataclass

from litapp.models.lit import LiTTransformer2DModel

# Text-to-image keeps the output projection; Q, K, V and the convolution start fresh
# (arXiv 2501.12976, section 4.3: loading Q, K or V hurts).
FRESH = (".attn1.to_q.", ".attn1.to_k.", ".attn1.to_v.", ".attn1.dwc.")


@dataclass(frozen=True)
class Inheritance:
    """Tensor names: taken from the teacher, fresh in the student, left in the teacher."""

    inherited: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]


def inherit(student: LiTTransformer2DModel, teacher: LiTTransformer2DModel) -> Inheritance:
    """Copy the teacher's weights into ``student``, in place, by the rules for text-to-image.

    Raises:
        ValueError: the teacher lacks a tensor or has it in another shape; nothing is copied.
    """
    target, source = student.state_dict(), teacher.state_dict()
    wanted = [name for name in target if not any(part in name for part in FRESH)]
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
