"""Plans, policies and what was drawn for a view, in words. Used by `inspect`, its page and `diff`; numbers are in `facts`.

Every function takes the values themselves and gives short English phrases, in the order in which things happen.
"""

from __future__ import annotations

from kdcache import augment
from kdcache.augment import OPS, Q16
from kdcache.plan import POLICIES, Policy
from kdcache.view_params import CUTMIX, ERASE_NOISE, Box, ViewParams

_AMOUNTS = {
    augment.ROTATE: "by {:+.1f}°",
    augment.POSTERIZE: "to {:.0f} bits",
    augment.SOLARIZE: "from {:.0f} up",
    augment.SOLARIZE_ADD: "{:.0f}",
    augment.COLOR: "x {:.2f}",
    augment.CONTRAST: "x {:.2f}",
    augment.BRIGHTNESS: "x {:.2f}",
    augment.SHARPNESS: "x {:.2f}",
    augment.SHEAR_X: "by {:+.2f}",
    augment.SHEAR_Y: "by {:+.2f}",
    augment.TRANSLATE_X: "by {:+.0%} of the side",
    augment.TRANSLATE_Y: "by {:+.0%} of the side",
    augment.GAUSSIAN_BLUR: "with sigma {:.2f} px",
}
"""What follows the name of an op whose magnitude says something."""


def policy_name(policy: Policy) -> str:
    """The name by which `--augment` knows these values, else 'custom'."""
    return next((name for name, known in POLICIES.items() if known == policy), "custom")


def policy_in_words(policy: Policy) -> list[str]:
    """What may happen to an image, in order."""
    crop = policy.crop
    if crop.kind == "center":
        words = [f"centre crop of {crop.crop_pct:.4g} of the shorter side"]
    else:
        words = [
            f"random crop of {100 * crop.scale[0]:.3g} to {100 * crop.scale[1]:.3g} % of the area, ratio {crop.ratio[0]:.3g} to {crop.ratio[1]:.3g}"
        ]
    words[0] += f", {policy.interpolation}"
    if policy.hflip:
        words.append(f"flipped with probability {policy.hflip:g}")
    if (three := policy.three_augment) is not None:
        words.append(f"{_chance(three.prob)}one of greyscale, solarize, blur (sigma {three.sigma[0]:g} to {three.sigma[1]:g} px)")
    if (rand := policy.rand_augment) is not None:
        words.append(
            f"RandAugment: {rand.num_ops} of 15 ops, each applied with probability {rand.prob:g}, magnitude {rand.magnitude:g}"
            + (f" ± {rand.magnitude_std:g}" if rand.magnitude_std else "")
            + ("" if rand.increasing else ", not increasing")
        )
    if (jitter := policy.color_jitter) is not None:
        strengths = {"brightness": jitter.brightness, "contrast": jitter.contrast, "saturation": jitter.saturation}
        words.append(f"{_chance(jitter.prob)}colour jitter: {', '.join(f'{name} ± {value:g}' for name, value in strengths.items() if value)}")
    if (erase := policy.erase) is not None:
        color = erase.color or (0, 0, 0)
        filling = "noise" if erase.mode == "noise" else f"colour {color}"
        words.append(f"with probability {erase.prob:g} a rectangle of {100 * erase.area[0]:.3g} to {100 * erase.area[1]:.3g} % erased with {filling}")
    if (mix := policy.mix) is not None:
        kinds = [f"Mixup (alpha {mix.mixup_alpha:g})"] * bool(mix.mixup_alpha) + [f"CutMix (alpha {mix.cutmix_alpha:g})"] * bool(mix.cutmix_alpha)
        switch = f", CutMix with probability {mix.switch_prob:g}" if len(kinds) == 2 else ""
        words.append(f"{_chance(mix.prob)}{' or '.join(kinds)} with another sample of the tar{switch}")
    return words


def _chance(probability: float) -> str:
    return f"with probability {probability:g} " if probability < 1 else ""


def box_in_words(box: Box) -> str:
    """Its size, and its left and top edge."""
    return f"{box.width} x {box.height} px at ({box.left}, {box.top})"


def params_in_words(params: ViewParams, partner: str | None = None) -> list[str]:
    """What happened to one view, in order. partner: what a mixed view's partner is called, default its place in the tar."""
    words = [f"crop {box_in_words(params.crop)}"]
    if params.flip:
        words.append("flipped")
    words += [op_in_words(op, magnitude) for op, magnitude in params.ops]
    if (erase := params.erase) is not None:
        color = (erase.seed >> 16, erase.seed >> 8 & 255, erase.seed & 255)
        words.append(f"erased {box_in_words(erase.box)} with {'noise' if erase.mode == ERASE_NOISE else f'colour {color}'}")
    if (mix := params.mix) is not None:
        how = f"CutMix {box_in_words(mix.box)}" if mix.mode == CUTMIX else "Mixup"
        words.append(f"{how} with sample {partner or f'{mix.partner} of the tar'}, own weight {mix.lambda_q16 / Q16:.3f}")
    return words


def op_in_words(op: int, magnitude_q16: int) -> str:
    """One image op as it was applied; `augment.OPS` gives its number and unit."""
    return f"{OPS[op].name} {_AMOUNTS[op].format(magnitude_q16 / Q16)}" if op in _AMOUNTS else OPS[op].name
