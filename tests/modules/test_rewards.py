"""RewardModel against transformers itself, whatever the padding, and what it refuses."""

import pytest
import torch

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.rewards import RewardModel
from tests.helpers.texts import write_model, write_reward_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("reward")
    write_reward_model(place / "one")
    write_reward_model(place / "two", num_labels=2)
    return place


PROMPTS = [[1, 5, 9], [1, 7], [1, 5, 9, 12, 6]]
RESPONSES = [[20, 21, 2], [22, 23, 24, 25], [2]]  # two of them with the end token


def padded(pad=2):
    """Prompts padded on the left, responses on the right."""
    before, after = max(map(len, PROMPTS)), max(map(len, RESPONSES))
    sequences = torch.full((3, before + after), pad)
    kinds = torch.zeros_like(sequences)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        sequences[row, before - len(prompt) : before] = torch.tensor(prompt)
        sequences[row, before : before + len(response)] = torch.tensor(response)
        kinds[row, before - len(prompt) : before] = 1
        kinds[row, before : before + len(response)] = 2
    return sequences, kinds


@pytest.mark.parametrize("pad", [0, 2], ids=["a token of its own", "the end token"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_score_is_that_of_the_last_token(folder, pad, batch_size):
    reward = RewardModel(str(folder / "one"), batch_size)
    found = reward(*padded(pad))
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        tokens = torch.tensor([prompt + response])
        states = reward.model.model(tokens).last_hidden_state[0, -1]
        torch.testing.assert_close(found[row], reward.model.score(states)[0], rtol=0, atol=1e-5)
    assert found.shape == (3,)
    assert not found.requires_grad


def test_refusals(folder, tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"two'\) has 2 outputs; expected one"):
        RewardModel(str(folder / "two"))
    with pytest.raises(UnsupportedSetup, match="opens no sequence classifier there"):
        RewardModel(str(tmp_path))
    with pytest.raises(UnsupportedSetup, match="batch_size=0"):
        RewardModel(str(folder / "one"), 0)


def test_the_policy_may_not_know_more_tokens(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    from lightning_soup.modules.alignment_checks import check_vocabularies

    policy = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "m", vocab_size=90))
    with pytest.raises(UnsupportedSetup, match="knows 80 tokens, the policy 90"):
        check_vocabularies(policy, None, RewardModel(str(folder / "one")), None)
