"""
The prose is checked like code: lines, names of tests, links, commands, and the length of sentences.

    python tests/test_docs.py      # write the line numbers in docs/*.md anew

A line is named as in docs/equations.md: `gae` in [ppo.py:99](../ppo.py#L99). A test is named as
`test_gae_by_hand` in [tests/test_ppo.py](../tests/test_ppo.py).
"""
import ast
import functools
import glob
import importlib
import os
import re
import shlex
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FRONT = ['README.md', 'README.zh.md']
PAGES = FRONT + ['CONTRIBUTING.md', 'CHANGELOG.md', *(f'{folder}/README.md' for folder in ('tests', 'lessons', 'lab')),
                 'lessons/README.zh.md'] + sorted(
    os.path.relpath(path, ROOT).replace(os.sep, '/') for path in glob.glob(os.path.join(ROOT, 'docs', '*.md')))
PAGES = [page for page in PAGES if os.path.exists(os.path.join(ROOT, page))]
NAMED = re.compile(r'`([\w.]+)`(\s+)in(\s+)\[([\w/]+\.py):(\d+)\]\(([\w./]+)#L(\d+)\)')

@functools.cache
def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()

def resolve(page, link):
    """Return the path below ROOT that a page's relative link names."""
    return os.path.normpath(os.path.join(os.path.dirname(page), link)).replace(os.sep, '/')

# ---------------------------------------------------------------------------------------------------------------------
# lines and tests

@functools.cache
def definitions(path):
    """Return {name: line of its def or class} of a file; a method's name is Class.method."""
    found = {}

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found[prefix + child.name] = child.lineno
                if isinstance(child, ast.ClassDef):
                    walk(child, prefix + child.name + '.')

    walk(ast.parse(read(path), path), '')
    return found

def with_lines(page):
    """Return a page's text with the line numbers that its names have now."""
    def now(match):
        name, before, after, path, _, link, _ = match.groups()
        line = definitions(path).get(name, 0) # 0: no longer there, which the tests tell
        return f'`{name}`{before}in{after}[{path}:{line}]({link}#L{line})'

    return NAMED.sub(now, read(page))

@pytest.mark.parametrize('page', PAGES)
def test_every_line_is_that_of_the_function_named_there(page):
    text = read(page)
    for name, _, _, path, line, link, anchor in NAMED.findall(text):
        assert resolve(page, link) == path and anchor == line, (page, name)
        assert definitions(path).get(name) == int(line), f"{page}: {name}, {path}; run python tests/test_docs.py"
    assert len(re.findall(r'\.py:\d|#L\d', text)) == 2 * len(NAMED.findall(text)), f"{page}: a line without its name"

def test_line_numbers_are_found_and_written_anew(monkeypatch):
    """A method, a decorated function, and a link that is out of date."""
    texts = {'a.py': '@cache\ndef f():\n    pass\n\n\nclass C:\n    def g(self):\n        pass\n',
             'p.md': '`f` in [a.py:9](a.py#L9), `C.g`\nin [a.py:1](a.py#L1)'}
    monkeypatch.setattr(sys.modules[__name__], 'read', texts.__getitem__)
    definitions.cache_clear()
    assert with_lines('p.md') == '`f` in [a.py:2](a.py#L2), `C.g`\nin [a.py:7](a.py#L7)'
    definitions.cache_clear()

def test_every_equation_has_its_code_and_its_test():
    sections = re.split(r'^### ', read('docs/equations.md'), flags=re.MULTILINE)[1:]
    assert len(sections) >= 45
    for section in sections:
        title = section.split('\n')[0]
        assert re.search(r'^    \S', section, re.MULTILINE), title
        assert '- Code: `' in section and '- By hand: `test_' in section, title

@pytest.mark.parametrize('page', PAGES)
def test_every_test_named_exists(page):
    """The test stands in the file of the next link."""
    text = read(page)
    for match in re.finditer(r'`(test_\w+)`', text):
        link = re.search(r'\]\(([\w./]*\btest_\w+\.py)\)', text[match.end():])
        assert link, (page, match[1])
        path = resolve(page, link[1])
        assert os.path.exists(os.path.join(ROOT, path)), (page, path)
        assert match[1] in definitions(path), (page, match[1], path)

# ---------------------------------------------------------------------------------------------------------------------
# equations that are a part of a larger function

def test_the_whole_loss_by_hand():
    """PPO, equation 9: one answer of two tokens, on a critic of its own and on a shared one."""
    import torch
    import ppo
    from common.run import Run
    T = torch.tensor

    class Fixed:
        def logp_entropy_values(self, idx, mask, with_entropy, groups):
            return T([[-1.0, -2.0, 9.0]]), T([[0.5, 1.5, 9.0]]) if with_entropy else None, T([[1.0, 3.0, 9.0]])

        def values(self, idx, mask, groups):
            return T([[2.0, 3.0, 9.0]])

    # ratio 1: the policy loss is -(1 + 4) / 2 = -2.5. Half the squared errors to the returns 1 and 1, from V_old within
    # the clip of 100: shared, values 1 and 3: (0 + 2) / 2 = 1; separate, values 2 and 3: (0.5 + 2) / 2 = 1.25.
    # The entropy is (0.5 + 1.5) / 2 = 1. The third position is padding
    batch = dict(idx=T([[0, 1, 2, 3]]), groups=T([1]), mask=T([[1.0, 1.0, 0.0]]), old_logp=T([[-1.0, -2.0, 0.0]]),
                 advantages=T([[1.0, 4.0, 9.0]]), returns=T([[1.0, 1.0, 9.0]]), old_values=T([[0.0, 0.0, 9.0]]))
    cfg = ppo.Config(prompts='-', value_clip=100.0, value_coef=0.1, entropy_coef=0.01)
    one, two, run = Fixed(), Fixed(), Run('cpu', 'float32')
    shared, *_ = ppo.ppo_loss(ppo.Models(one, one, None, None), batch, cfg, run)
    separate, *_ = ppo.ppo_loss(ppo.Models(one, two, None, None), batch, cfg, run)
    assert shared.item() == pytest.approx(-2.5 + 0.1 * 1.0 - 0.01, abs=1e-6)
    assert separate.item() == pytest.approx(-2.5 + 1.25 - 0.01, abs=1e-6)

# ---------------------------------------------------------------------------------------------------------------------
# links

def without_code(text):
    """Return Markdown without fenced and indented code."""
    text = re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r'(?<=\n\n)(?: {4}.*\n|\n)+', '\n', text)

def anchors(path):
    """Return the anchors that GitHub gives a page's headings."""
    found = []
    for heading in re.findall(r'^#+ +(.*?) *$', without_code(read(path)), re.MULTILINE):
        heading = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading)
        slug = re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
        found.append(slug + (f'-{found.count(slug)}' if slug in found else ''))
    return found

def test_anchors_by_hand(monkeypatch):
    text = ("# Bradley–Terry\n```\n# no heading\n```\n## Cohen's kappa, `again`\n"
            "## PPO, 7\n\n    # code\n\n## PPO, 7\n")
    monkeypatch.setattr(sys.modules[__name__], 'read', lambda path: text)
    assert anchors('x') == ['bradleyterry', 'cohens-kappa-again', 'ppo-7', 'ppo-7-1']

@pytest.mark.parametrize('page', PAGES)
def test_links_resolve(page):
    text = without_code(read(page))
    links = re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r'\w+:', link):
            continue # on the web
        path, _, anchor = link.partition('#')
        path = resolve(page, path) if path else page
        assert os.path.exists(os.path.join(ROOT, path)), (page, link)
        if anchor and path.endswith('.md'):
            assert anchor in anchors(path), (page, link)

def test_no_page_names_a_folder_of_one_machine():
    for page in PAGES:
        assert not re.search(r'/(?:home|root|work|tmp|Users)/', read(page)), page

# ---------------------------------------------------------------------------------------------------------------------
# sentences

def sentences(text):
    """Return the sentences of Markdown, as plain words; rows of tables, items and headings end one too."""
    text = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', without_code(text)) # a link reads as its text
    text = re.sub(r'`[^`]*`', '`code`', text)
    text = re.sub(r'^#.*$', r'\g<0>\n', text, flags=re.MULTILINE)
    text = re.sub(r'^(?:[-*] |\d+\. |#+ |>)', '\n\n', text, flags=re.MULTILINE)
    text = re.sub(r'^\|.*$', lambda row: row[0].replace('|', '\n\n'), text, flags=re.MULTILINE)
    for paragraph in re.split(r'\n\s*\n', text):
        yield from (' '.join(s.split()) for s in re.split(r'(?<=[.!?])[)"*]*\s+(?=[A-Z`"*(])', paragraph.strip()) if s)

def n_words(sentence):
    return len([word for word in sentence.split() if re.search(r'[^\W\d_]', word)])

def test_sentences_by_hand():
    text = ("# A head\nOne two. Three [four five](x) et al. 2019, six: `a b`.\n\n"
            "- an item\n  of it\n- more\n\n| a b | c |\n")
    assert [n_words(s) for s in sentences(text)] == [2, 2, 7, 4, 1, 2, 1]

@pytest.mark.parametrize('page', [page for page in PAGES if page != 'README.zh.md'])
def test_sentences_are_short(page):
    found = list(sentences(read(page)))
    assert [s for s in found if n_words(s) > 35] == []

@pytest.mark.parametrize('page', PAGES)
def test_no_paragraph_stands_twice(page):
    long = [p for p in read(page).split('\n\n') if len(p) > 100 and not p.startswith('- Code:')]
    assert [p for p in long if long.count(p) > 1] == []

def test_the_front_page_is_short():
    assert len(read('README.md').splitlines()) <= 200
    assert len(read('README.md').split()) <= 2200

# ---------------------------------------------------------------------------------------------------------------------
# commands

def commands(text):
    """Return the commands `python …` and `torchrun …` of code blocks and of inline code, as lists of words."""
    fenced = re.findall(r'^```[^\n]*\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r'(?<=\n\n)((?: {4}.*\n|\n)+)', prose)
    code = '\n'.join(fenced + indented).replace('\\\n', ' ').splitlines()
    code += [' '.join(c.split()) for c in re.findall(r'`([^`]+)`', prose)]
    found = []
    for line in code:
        try:
            words = shlex.split(line.strip().removeprefix('$ '), comments=True)
        except ValueError: # not of a shell
            continue
        command = []
        for word in words + ['&&']:
            if word in ('&&', '||', '|', ';', '>', '&'):
                while command and re.match(r'[A-Z_]+=', command[0]):
                    command = command[1:] # of the environment
                if command and command[0] in ('python', 'torchrun', 'pip'):
                    found.append(command)
                command = []
            else:
                command.append(word)
    return found

def script_of(command):
    """Return (path of the script, its arguments), or None where the command is of another kind."""
    program, *words = command
    if program == 'torchrun':
        while words and words[0].startswith('--'):
            words = words[1:]
    elif words[:1] == ['-m']:
        return (words[1].replace('.', '/') + '.py', words[2:]) if '.' in words[1] else None
    if words and words[0].endswith('.py'):
        return words[0], words[1:]
    return None

def test_commands_by_hand():
    text = ('```\nA=1 python a.py x.py \\\n  --b=1 && pip install -r r.txt # why\n```\n\n'
            '    torchrun --n=2 a.py --c="d e"\n\n'
            'Then `python -m b.c\n--d=1` and `python -c "1"`.\n')
    found = commands(text)
    assert found == [['python', 'a.py', 'x.py', '--b=1'], ['pip', 'install', '-r', 'r.txt'],
                     ['torchrun', '--n=2', 'a.py', '--c=d e'], ['python', '-m', 'b.c', '--d=1'], ['python', '-c', '1']]
    assert [script_of(c) for c in found if c[0] != 'pip'] == [
        ('a.py', ['x.py', '--b=1']), ('a.py', ['--c=d e']), ('b/c.py', ['--d=1']), None]

def places_with_commands():
    """Return (page or script, command): of all pages but two, and of the docstrings of scripts."""
    elsewhere = ('CHANGELOG.md', 'docs/hacking.md') # old names; test_hacking.py runs these
    texts = {page: read(page) for page in PAGES if page not in elsewhere}
    for pattern in ('*.py', 'data/*.py', 'data/*/*.py', 'lab/*.py', 'feedback/*.py'):
        for path in glob.glob(os.path.join(ROOT, pattern)):
            path = os.path.relpath(path, ROOT).replace(os.sep, '/')
            texts[path] = '\n' + (ast.get_docstring(ast.parse(read(path))) or '') + '\n\n'
    return [(place, command) for place, text in sorted(texts.items()) for command in commands(text)]

@pytest.mark.parametrize('page, command', places_with_commands(),
                         ids=lambda x: x if isinstance(x, str) else ' '.join(x))
def test_a_command_names_a_script_its_config_files_and_its_options(page, command, monkeypatch, capsys):
    """The script's own parser reads it, config files too; files of a reader's own need not exist."""
    from common.options import parse_config
    monkeypatch.chdir(ROOT)
    if command[0] == 'pip':
        for option, path in zip(command, command[1:]):
            assert option not in ('-r', '-c') or os.path.exists(path), path
        return
    script = script_of(command)
    if script is None or 'NAME' in script[0]:
        return
    path, args = script
    assert os.path.exists(path), path
    if 'Config' not in definitions(path):
        assert not args, args
        return
    Config = importlib.import_module(path.removesuffix('.py').replace('/', '.')).Config
    if path == 'data/peek.py': # `--file=` may be left out
        args = [arg if arg.startswith('--') else f'--file={arg}' for arg in args]
    if path in ('lab/plot.py', 'lab/board.py'): # the rest are folders of runs, or files
        args = [arg for arg in args if arg.startswith('--')]
    args = [arg.strip('[]') for arg in args if arg not in ('…', '--help')] # [--key=value]: may be left out
    if any('…' in arg or re.fullmatch(r'--\w+=N', arg) for arg in args): # a place to fill in: names alone
        known = Config.__dataclass_fields__
        assert [arg for arg in args if arg.startswith('--') and arg[2:].split('=')[0] not in known] == []
        return
    try:
        parse_config(Config, args)
    except SystemExit as stopped:
        needed = 'must be a file' in (said := capsys.readouterr().err) and len(args) < 2
        assert stopped.code == 0 or needed, said # `python ppo.py` in prose names the script alone

def test_options_named_in_prose_exist():
    """`--key=value` is an option of some script, `ppo.py --key=value` one of that script."""
    options = {}
    for pattern in ('*.py', 'data/*.py', 'data/*/*.py', 'lab/*.py', 'feedback/*.py'):
        for path in (found.replace(os.sep, '/') for found in glob.glob(pattern, root_dir=ROOT)):
            if 'Config' in definitions(path):
                module = importlib.import_module(path.removesuffix('.py').replace('/', '.'))
                options[path] = {'help'} | set(module.Config.__dataclass_fields__)
    known = set().union(*options.values()) | {'key', 'full'} # the form --key=value itself, and a lesson's own switch
    for page in PAGES:
        if page != 'CHANGELOG.md':
            for script, name in re.findall(r'`(?:([\w/]+\.py)\s)?--(\w+)', read(page)):
                assert name in (options[script] if script else known), (page, script, name)

def test_the_tests_command_is_the_one_that_ci_runs():
    ci = read('.ci/run').replace('pip install -q ', 'pip install ').splitlines()[-1]
    assert ci == 'pip install -r requirements.txt -c tests/constraints.txt && pytest'
    for page in FRONT:
        assert any(line.startswith(ci) for line in read(page).splitlines()), page

def test_ci_pins_what_is_required():
    """Every requirement is pinned, at a version that it allows; requirements-dev.txt too."""
    def parse(path):
        lines = [line.partition('#')[0].strip() for line in read(path).splitlines()]
        return {m[1]: (m[2], tuple(map(int, m[3].split('.')))) for line in lines
                if (m := re.fullmatch(r'([\w-]+)([>=]=)([\d.]+)', line))}
    pins = parse('tests/constraints.txt')
    needs = parse('requirements.txt') | parse('requirements-dev.txt')
    assert {sign for sign, _ in pins.values()} == {'=='} and {sign for sign, _ in needs.values()} == {'>='}
    assert needs.keys() == pins.keys()
    for name, (_, least) in needs.items():
        assert pins[name][1] >= least, name

if __name__ == '__main__':
    for page in PAGES:
        new = with_lines(page)
        if new != read(page):
            with open(os.path.join(ROOT, page), 'w', encoding='utf-8') as f:
                f.write(new)
            print(f"{page}: line numbers written anew")
