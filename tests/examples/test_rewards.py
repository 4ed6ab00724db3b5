import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import log_loss
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.svm import SVC

from examples.digits.pictures import real_digits, tint
from examples.digits.prompts import DIGITS
from examples.digits.rewards import DigitsReward, SecondDigitsReward, digit_samples, kernel_classifier, tint_nearness


@pytest.fixture(scope="module", params=[DigitsReward, SecondDigitsReward])
def reward(request):
    return request.param()


def pictures(color: str = "red", count: int = 40) -> tuple[list[Image.Image], list[str]]:
    ink, labels = real_digits()
    shown = [Image.fromarray(tint(i, color, (1, -1))) for i in ink[:count]]
    return shown, [f"a {color} {DIGITS[label]}" for label in labels[:count]]


def test_right_prompts_score_high_and_wrong_ones_low(reward):
    images, prompts = pictures()
    right = reward.score(images, prompts)
    assert right.dtype == torch.float32
    assert right.shape == (40,)
    assert right.mean() > 0.9
    assert reward.score(images, prompts[1:] + prompts[:1]).mean() < 0.3


def test_only_the_second_reward_looks_at_the_colour():
    images, prompts = pictures("red")
    blue = [prompt.replace("red", "blue") for prompt in prompts]
    first, second = DigitsReward(), SecondDigitsReward()
    assert torch.equal(first.score(images, prompts), first.score(images, blue))
    assert (second.score(images, prompts) > 1.5 * second.score(images, blue)).float().mean() > 0.9


def test_bad_input(reward):
    images, prompts = pictures(count=2)
    with pytest.raises(ValueError, match="must each name a digit, got 'a red thing'"):
        reward.score(images, [prompts[0], "a red thing"])
    with pytest.raises(ValueError, match="must be 32x32, got 64x64"):
        reward.score([image.resize((64, 64)) for image in images], prompts)


def test_nearness_of_tints():
    picture = tint(real_digits()[0][0], "red")
    assert tint_nearness(picture, "red") > 0.99
    assert tint_nearness(picture, "blue") < 0.6
    assert tint_nearness(picture, None) == 1
    assert tint_nearness(np.zeros((32, 32, 3), np.uint8), "red") == 0


def test_probabilities_are_better_calibrated_than_a_sigmoid_per_class():
    features, labels = digit_samples()
    digit = np.tile(np.arange(len(labels) // 2), 2)  # both views of a digit on one side
    keep = digit % 3 == 0
    machine = CalibratedClassifierCV(SVC(gamma=0.25, C=10.0), ensemble=False, cv=3)
    losses = [
        log_loss(
            labels[keep],
            cross_val_predict(
                classifier, features[keep], labels[keep], groups=digit[keep],
                cv=GroupKFold(3), method="predict_proba",
            ),
        )
        for classifier in (kernel_classifier(), machine)
    ]  # fmt: skip
    assert losses[0] < losses[1]


def test_the_first_reward_has_a_gradient():
    images, prompts = pictures(count=6)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images])
    scores = DigitsReward().score_pixels(pixels.requires_grad_(), prompts)
    torch.testing.assert_close(scores.detach(), DigitsReward().score(images, prompts), atol=0.02, rtol=0)
    assert torch.autograd.grad(scores.sum(), pixels)[0].abs().amax((1, 2, 3)).min() > 0
