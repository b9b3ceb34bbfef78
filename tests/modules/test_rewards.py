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
    language = write_model(tmp_path / "language")  # transformers would draw a head, and every score at random
    with pytest.raises(
        UnsupportedSetup, match=r"1 weights are not there, the first is score\.weight; expected a train"
    ):
        RewardModel(str(language))


def write_classifier(path, **config):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**config, num_labels=1)).save_pretrained(path)
    return RewardModel(str(path))


def test_where_all_tokens_occur_there_is_no_padding(tmp_path):
    """Of a vocabulary of six no token is left to stand for it."""
    sizes = {"vocab_size": 6, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 8}
    reward = write_classifier(tmp_path / "gpt2", model_type="gpt2", **sizes, eos_token_id=0, bos_token_id=0)
    sequences = torch.tensor([[1, 2, 3, 4, 5, 0], [0, 0, 1, 2, 3, 0]])
    kinds = torch.tensor([[1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 2, 2]])
    found = reward(sequences, kinds)
    reward.model.config.pad_token_id = None
    for row in range(2):
        alone = reward.model(input_ids=sequences[row][kinds[row] > 0][None]).logits[0, 0]
        torch.testing.assert_close(found[row], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "limit"), [("bert", 12), ("roberta", 10)])
def test_positions(tmp_path, family, limit):
    """Padding does not count."""
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    options = {"num_attention_heads": 1, "max_position_embeddings": 12, "pad_token_id": 1}
    reward = write_classifier(tmp_path / "m", model_type=family, **sizes, **options)
    tokens = torch.full((2, 16), 5)
    kinds = torch.ones_like(tokens)
    kinds[:, : 16 - limit] = 0
    assert reward(tokens, kinds).shape == (2,)
    kinds[1, 15 - limit] = 1
    with pytest.raises(UnsupportedSetup, match=f"has {limit} positions, and prompt and response {limit + 1} tokens"):
        reward(tokens, kinds)


def test_the_policy_may_not_know_more_tokens(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    from lightning_soup.modules.alignment_checks import check_vocabularies

    policy = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "m", vocab_size=90))
    with pytest.raises(UnsupportedSetup, match="knows 80 tokens, the policy 90"):
        check_vocabularies(policy, None, RewardModel(str(folder / "one")), None)
