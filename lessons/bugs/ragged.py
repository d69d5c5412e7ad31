"""With prompts of one length all is well. With a mixture the policy answers as if it misread."""
from common import rollout
from common.run import progress

STAGE = 'grpo'

def sample_answers(model, prompts, tok, max_new_tokens, temperature=1.0, rows=256, desc=None):
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers, logps = [None] * len(prompts), [None] * len(prompts)
    bar = progress(total=len(prompts), desc=desc, unit='answers', disable=desc is None)
    for start in range(0, len(order), rows):
        chunk = order[start:start + rows]
        out = model.generate_with_logp([[0] * (len(prompts[chunk[-1]]) - len(prompts[i])) + prompts[i] for i in chunk],
                                       max_new_tokens, temperature, eos=tok.eos)
        for i, answer, logp in zip(chunk, *out):
            answers[i], logps[i] = answer, logp
        bar.update(len(chunk))
    bar.close()
    return answers, logps

PATCHES = [(rollout, sample_answers)]
