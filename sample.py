"""
Talk to any checkpoint in the terminal, also to other people's; the answer appears token by token.

    python sample.py --policy=out/toy/ppo --prompt="Where does the fox live?"
    python sample.py --policy=gpt2 --temperature=0.8 --top_p=0.9

Without --prompt this is a conversation: each line is a turn that the model sees together with the turns before it, as
far as they fit its context; the oldest are forgotten first. /reset forgets all; an empty line, Ctrl-D or Ctrl-C ends.
An answer ends at its end of text, where a model that never learnt one goes on with the next "### Human:", after
max_new_tokens, or at Ctrl-C, which leaves the conversation as far as it was printed.
"""

import codecs
import contextlib
import signal
import sys
from dataclasses import dataclass

import common
from common import check_common, fail, launch, require

from model import load_policy, load_reward_model
from rollout import check_context, check_same_vocabulary, score_answers
from tokens import SPEAKER, load_tokenizer, prompt_ids, response_ids

STOP = SPEAKER['user'].rstrip() # "### Human:"


@dataclass
class Config:
    policy: str = 'out/sft' # whom to talk to: a checkpoint folder, or a model on the hub
    prompt: str = '' # answer this one prompt and leave; empty = a conversation
    temperature: float = 1.0 # 0 = always the likeliest token
    top_k: int = 0 # sample from the k likeliest tokens; 0 = from all
    top_p: float = 1.0 # sample from the likeliest tokens that together reach this probability; 1 = from all
    max_new_tokens: int = 64 # longest answer, at most half of the model's context
    reward_model: str = '' # also print this reward model's score of each answer; empty = none
    seed: int = 1
    device: str = 'auto' # auto, cpu, cuda, cuda:N, mps
    dtype: str = 'auto' # float32; bfloat16 or float16 (autocast); auto: bfloat16 on CUDA, float16 where it lacks that

    def __post_init__(self):
        check_common(self)
        require(self, temperature=(self.temperature >= 0, 'at least 0'), top_k=(self.top_k >= 0, 'at least 0'),
                top_p=(0 < self.top_p <= 1, 'above 0 and at most 1'))


def stream_text(tok, tokens):
    """
    Token ids, one by one -> pieces of text, without the space that every answer begins with. A character whose bytes
    are spread over several tokens comes when it is complete; bytes that are no character come as U+FFFD.
    """
    decoder, first = codecs.getincrementaldecoder('utf-8')('replace'), True
    for token in tokens:
        piece = decoder.decode(tok.decode_bytes([token]))
        if piece:
            yield piece.removeprefix(' ') if first else piece
            first = False
    yield decoder.decode(b'', final=True)


def until_next_turn(pieces):
    """
    Pieces of text up to STOP, the newline before it left out. What may be their beginning is held back until the next
    piece decides, so that nothing of them is ever printed.
    """
    beginnings = [stop[:n] for stop in (STOP, '\n' + STOP) for n in range(len(stop))] # '' is one of them
    held = ''
    for piece in pieces:
        said, stop, _ = (held + piece).partition(STOP)
        if stop:
            yield said.removesuffix('\n')
            return
        n = max(len(b) for b in beginnings if said.endswith(b))
        yield said[:len(said) - n]
        held = said[len(said) - n:]
    yield held


def fit(tok, messages, room):
    """
    The conversation's ids, at most `room` of them, and what was forgotten for it, in words or ''. The oldest question
    goes together with its answer; only when the last question alone is too long does it lose its beginning.
    """
    kept = list(messages)
    ids = prompt_ids(tok, kept)
    while len(ids) > room and len(kept) > 2:
        kept = kept[2:]
        ids = prompt_ids(tok, kept)
    notice = f"forgot the oldest {len(messages) - len(kept)} messages" if len(kept) < len(messages) else ''
    if len(ids) > room:
        notice = f"read only the last {room} of {len(ids)} tokens"
    return ids[-room:], notice


def main(cfg):
    run = common.start(cfg)
    signal.signal(signal.SIGINT, signal.default_int_handler) # there is nothing to save: the first Ctrl-C ends
    sys.stdout.reconfigure(errors='replace') # a character that the terminal does not know is no reason to stop
    tok = load_tokenizer(cfg.policy)
    model = load_policy(cfg.policy).to(run.device).eval()
    if cfg.reward_model:
        judge = load_reward_model(cfg.reward_model).to(run.device).eval()
        check_same_vocabulary(model, judge, 'reward_model', cfg.reward_model, tok)
        check_context(model, judge, 'reward_model', cfg.reward_model)
    block_size = model.config.block_size
    longest = min(cfg.max_new_tokens, block_size // 2)
    room = block_size - longest # for the prompt

    def answer(ids):
        """Print the answer to a prompt's ids while it is made; returns its text."""
        tokens, text = [], ''

        def one_by_one():
            for _, new, _ in model.stream([ids], longest, cfg.temperature, cfg.top_k, cfg.top_p, tok.eos):
                tokens.append(new.item())
                yield tokens[-1]

        with run.autocast():
            try:
                for piece in until_next_turn(stream_text(tok, one_by_one())):
                    text += piece
                    print(piece, end='', flush=True)
            except KeyboardInterrupt:
                if cfg.prompt:
                    raise
            if STOP in tok.decode(tokens): # judge what was printed
                tokens = response_ids(tok, text)
            score = score_answers(judge, [ids], [tokens], run.device).item() if cfg.reward_model else None
        print('' if score is None else f"   [score {score:.2f}]")
        return text

    if cfg.prompt:
        ids = prompt_ids(tok, cfg.prompt)
        if len(ids) > room:
            fail(f"--prompt: {len(ids)} tokens with their template; wanted at most {room}, the context of {block_size} "
                 f"less an answer of {longest}")
        answer(ids)
    else:
        with contextlib.suppress(ImportError): # Windows
            import readline # input() then edits lines by whole characters
        print(f"{cfg.policy}: context of {block_size} tokens; /reset forgets, an empty line or Ctrl-D ends")
        messages = []
        while True:
            try:
                line = input("\nyou:   ").strip()
            except EOFError:
                print()
                break
            if not line:
                break
            if line == '/reset':
                messages = []
                continue
            messages.append({'role': 'user', 'content': line})
            ids, notice = fit(tok, messages, room)
            if notice:
                print(f"({notice}: the context holds {block_size} tokens, {longest} of them for the answer)")
            print("model: ", end='', flush=True)
            messages.append({'role': 'assistant', 'content': answer(ids)})
    common.stop(run)


if __name__ == '__main__':
    launch(main, Config)
