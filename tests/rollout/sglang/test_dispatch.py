"""Which server a request goes to: a prompt's samples to one, prompts and what is too much to the idlest."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

from hypothesis import given
from hypothesis import strategies as st

from megatron_dppo.rollout.sglang.dispatch import DirectDispatch


def dispatch(urls: str, samples_per_prompt: int, prompts: int = 100) -> DirectDispatch:
    made = DirectDispatch()
    made.set_servers(urls)
    made.begin(prompts, samples_per_prompt)
    return made


def all_at_once(to: DirectDispatch, prompts: int, samples: int) -> list[list[str]]:
    """By prompt, the servers that its samples are on while all of them are in flight."""
    with ExitStack() as stack:
        return [[stack.enter_context(to.address_for(prompt)) for _ in range(samples)] for prompt in range(prompts)]


def test_the_samples_of_a_prompt_share_a_server_and_prompts_are_spread() -> None:
    servers = all_at_once(dispatch("abcd", 16), prompts=8, samples=16)
    assert all(len(set(of_prompt)) == 1 for of_prompt in servers)
    assert Counter(of_prompt[0] for of_prompt in servers) == {"a": 2, "b": 2, "c": 2, "d": 2}


def test_where_servers_outnumber_prompts_each_prompt_has_several_and_no_server_is_idle() -> None:
    urls = [f"server {number}" for number in range(48)]
    made = DirectDispatch()
    made.set_servers(urls)
    made.begin(8, 16)
    servers = all_at_once(made, prompts=8, samples=16)
    counts = Counter(url for of_prompt in servers for url in of_prompt)
    assert len(counts) == 48
    assert max(counts.values()) <= 3  # 128 samples
    assert sum(len(set(of_prompt)) for of_prompt in servers) <= 56, "few servers compute a prompt that others have"


@given(urls=st.integers(1, 9).map(lambda n: "abcdefghi"[:n]), prompts=st.integers(1, 20), samples=st.integers(1, 17))
def test_no_server_gets_a_prompts_worth_more_than_another(urls: str, prompts: int, samples: int) -> None:
    made = dispatch(urls, samples, prompts)
    counts = Counter(url for of_prompt in all_at_once(made, prompts, samples) for url in of_prompt)
    assert max(counts.values()) - min(counts[url] for url in urls) <= samples


def test_samples_leave_a_server_that_has_too_much_to_do() -> None:
    to = dispatch("ab", 2)
    with ExitStack() as slow:
        first, second = (slow.enter_context(to.address_for("long")) for _ in range(2))
        assert first == second == "a"
        with to.address_for("long") as third:
            assert third == "b"
    with to.address_for("long") as again:
        assert again == "a", "where its prompt is in the cache"


def test_prompts_of_a_server_that_is_gone_find_another() -> None:
    to = dispatch("ab", 4)
    with to.address_for("p") as url:
        assert url == "a"
        to.drop("a")
        with to.address_for("p") as other:
            assert other == "b"
    assert to.urls == ["b"]
    with to.address_for("p") as url:
        assert url == "b"
