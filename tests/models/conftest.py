import pytest
import torch

from align.data.tokenizer import train_tokenizer

TEMPLATE = "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Run tiny models on one thread: faster, and test workers do not compete for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a b"], vocab_size=259, chat_template=TEMPLATE).save_pretrained(folder)
    return folder
