"""Talk to any checkpoint in the terminal, also to other people's. The answer appears token by token.

    python sample.py --policy=out/toy/ppo --prompt="Where does the fox live?"
    python sample.py --policy=out/toy/base,out/toy/sft,out/toy/ppo
    python sample.py --policy=gpt2 --temperature=0.8 --top_p=0.9

Several policies answer one after the other. Each has its own tokenizer, hears its own answers alone, and says what it
would say without the others.

Without --prompt this is a conversation: what does not fit the context is forgotten, the oldest turns first. /reset
forgets all, /help says what one can type; /quit, an empty line, Ctrl-D or Ctrl-C ends. An answer ends with the
end-of-text token, before a next "### Human:" (some models never learnt to end), after max_new_tokens, or at Ctrl-C.
"""

import codecs
import contextlib
import sys
from collections import namedtuple
from dataclasses import dataclass

from common.checkpoints import load_policy, load_reward_model
from common.options import RunOptions, fail, launch, require, unread
from common.records import files_of
from common.rollout import check_context, check_same_vocabulary
from common.run import default_signals, start, stop
from common.tokens import SPEAKER, load_tokenizer, prompt_ids, response_ids
from feedback.annotators import check_finite, visible
from feedback.scores import score_answers

import torch

STOP = SPEAKER['user'].rstrip() # "### Human:"
HELP = ("/reset forgets what was said; /quit, an empty line or Ctrl-D ends; Ctrl-C ends an answer. Any other line goes "
        "to the model.")

@dataclass
class Config(RunOptions):
    policy: str = 'out/sft' # the model to talk to, a folder or a model on the hub; or several, with commas between
    prompt: str = '' # answer this one prompt and leave; empty = a conversation
    temperature: float = 1.0 # 0 = always the likeliest token
    top_k: int = 0 # sample from the k likeliest tokens; 0 = from all
    top_p: float = 1.0 # sample from the likeliest tokens that together reach this probability; 1 = from all
    max_new_tokens: int = 64 # longest answer, at most half of the model's context
    reward_model: str = '' # also print this reward model's score of each answer; empty = none

    def __post_init__(self):
        super().__post_init__()
        folders = files_of(self.policy)
        require(self, policy=(all(folders) and len({*folders}) == len(folders),
                              'a checkpoint folder or a model on the hub, or several with commas between, each once'))
        require(self, temperature=(self.temperature >= 0, 'at least 0'), top_k=(self.top_k >= 0, 'at least 0'),
                top_p=(0 < self.top_p <= 1, 'above 0 and at most 1'))
        unread(self, self.temperature > 0, 'a temperature above 0', 'top_k', 'top_p')

def stream_text(tok, tokens):
    """Turn token ids, one by one, into pieces of text.

    The space that every answer begins with is left out. A character comes when all its tokens are there; bytes that are
    no character come as U+FFFD.
    """
    decoder, first = codecs.getincrementaldecoder('utf-8')('replace'), True
    for token in tokens:
        piece = decoder.decode(tok.decode_bytes([token]))
        if piece:
            yield piece.removeprefix(' ') if first else piece
            first = False
    yield decoder.decode(b'', final=True)

def until_next_turn(pieces):
    """Yield pieces of text up to STOP, less the newline before it.

    A possible beginning of either is held back until the next piece decides, so that none of it is ever printed.
    """
    beginnings = [stop[:n] for stop in (STOP, '\n' + STOP, '\r\n' + STOP) for n in range(len(stop))] # '' is one
    held = ''
    for piece in pieces:
        said, stop, _ = (held + piece).partition(STOP)
        if stop:
            yield said.removesuffix('\n').removesuffix('\r')
            return
        n = max(len(b) for b in beginnings if said.endswith(b))
        yield said[:len(said) - n]
        held = said[len(said) - n:]
    yield held

def fit(tok, messages, room):
    """Return a conversation's last ids, at most `room`, and a notice: what was forgotten, or ''.

    The oldest question goes together with its answer. Only a last question that alone is too long loses its beginning.
    """
    ids, notice = prompt_ids(tok, messages), ''
    for first in range(2, len(messages), 2):
        if len(ids) > room:
            ids, notice = prompt_ids(tok, messages[first:]), (
                "the conversation has grown too long: what was said first is forgotten")
    if len(ids) > room:
        notice = f"your text is too long: only the last {room} of {len(ids)} tokens are read"
    return ids[-room:], notice

# A policy, named by its folder; room: how many tokens its prompt may have, longest: its answer; lead: what is printed
# before an answer
Voice = namedtuple('Voice', 'folder model tok room longest lead')

def load_voices(cfg, run, reward_model):
    """Load and check every policy."""
    folders, voices = files_of(cfg.policy), []
    width = max(map(len, folders))
    for folder in folders:
        tok = load_tokenizer(folder, 'policy')
        model = load_policy(folder).to(run.device).eval()
        if reward_model:
            check_same_vocabulary(model, reward_model, 'reward_model', cfg.reward_model, tok)
            check_context(model, reward_model, 'reward_model', cfg.reward_model)
        longest = min(cfg.max_new_tokens, model.config.block_size // 2)
        lead = f'{folder:<{width}}  ' if len(folders) > 1 else '' if cfg.prompt else 'model: '
        voices.append(Voice(folder, model, tok, model.config.block_size - longest, longest, lead))
    return voices

def main(cfg):
    run = start(cfg)
    default_signals() # there is nothing to save: the first Ctrl-C ends
    sys.stdout.reconfigure(errors='replace') # a character that the terminal does not know is no reason to stop
    reward_model = load_reward_model(cfg.reward_model).to(run.device).eval() if cfg.reward_model else None
    voices = load_voices(cfg, run, reward_model)
    indent = ' ' * len(voices[0].lead) if len(voices) > 1 else '' # of an answer's further lines

    def answer(voice, ids, turn=0):
        """Print the answer to a prompt as it comes; return its text."""
        torch.manual_seed(cfg.seed + turn) # other voices change nothing
        tokens, text = [], ''
        print(voice.lead, end='', flush=True)

        def heard():
            for _, new, logp in voice.model.stream([ids], voice.longest, cfg.temperature, cfg.top_k, cfg.top_p,
                                                   voice.tok.eos):
                check_finite(logp.tolist(), f"--policy={voice.folder}: its probabilities")
                tokens.append(new.item())
                yield tokens[-1]

        with run.autocast():
            try:
                for piece in until_next_turn(stream_text(voice.tok, heard())):
                    text += piece
                    print(visible(piece).replace('\n', '\n' + indent), end='', flush=True)
            except KeyboardInterrupt:
                if cfg.prompt:
                    raise
            if reward_model: # scores what was printed
                said = response_ids(voice.tok, text) if STOP in voice.tok.decode(tokens) else tokens
                score = score_answers(reward_model, [ids], [said], run.device).item()
                check_finite([score], f"--reward_model={cfg.reward_model}: its scores")
                print(f"   [score {score:.2f}]", end='')
        print()
        return text

    if cfg.prompt:
        prompts = [prompt_ids(voice.tok, cfg.prompt) for voice in voices]
        for voice, ids in zip(voices, prompts):
            if len(ids) > voice.room:
                fail(f"--prompt: {len(ids)} tokens with their template; wanted at most {voice.room}, the context of "
                     f"{voice.room + voice.longest} less an answer of {voice.longest}"
                     + f" ({voice.folder})" * (len(voices) > 1))
        for voice, ids in zip(voices, prompts):
            answer(voice, ids)
        return stop(run)
    with contextlib.suppress(ImportError): # Windows
        import readline # input() then edits lines by whole characters
    print(*(f"{voice.folder}: context of {voice.room + voice.longest} tokens;" for voice in voices),
          "/help says what you can type")
    said = {voice: [] for voice in voices} # the messages of each
    try:
        for turn, line in enumerate(iter(lambda: input("\nyou:   ").strip(), '')):
            if line == '/quit':
                break
            if line == '/help':
                print(HELP)
                continue
            if line == '/reset':
                said = {voice: [] for voice in voices}
                continue
            for messages in said.values():
                messages.append({'role': 'user', 'content': line})
            read = {voice: fit(voice.tok, messages, voice.room) for voice, messages in said.items()}
            for notice in dict.fromkeys(notice for _, notice in read.values() if notice): # once for all voices
                print(f"({notice})")
            for voice, (ids, _) in read.items():
                said[voice].append({'role': 'assistant', 'content': answer(voice, ids, turn)})
    except EOFError: # Ctrl-D
        print()
    stop(run)

if __name__ == '__main__':
    launch(main, Config)
