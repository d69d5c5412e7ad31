"""
The layout: which file may import which, how large each part may be, and how its functions introduce themselves.

CONTRIBUTING.md says what belongs where. A file that has no place yet fails here first.
"""
import ast
import os
import re
import shutil
import subprocess

import pytest

from tiny import ROOT

CORE_SCRIPTS = ['sft', 'reward', 'ppo', 'dpo', 'reinforce', 'rrhf', 'kto']
MAY_IMPORT_SCRIPTS = ('lab', 'lessons', 'bench', 'microscope')

def files():
    """Return the paths below ROOT that git tracks or would track, by '/'; without git, all that hold no output."""
    if shutil.which('git') and os.path.exists(os.path.join(ROOT, '.git')):
        listed = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT, text=True,
                                capture_output=True, check=True).stdout.splitlines()
    else:
        listed = [os.path.relpath(os.path.join(folder, name), ROOT).replace(os.sep, '/')
                  for folder, _, names in os.walk(ROOT) for name in names]
        listed = [path for path in listed if not re.match(r'\.|out/|build/|.*/\.|.*venv', path)]
    return sorted({path for path in listed if os.path.exists(os.path.join(ROOT, path))})

def source():
    """Return the paths of all source, .py, but for tests and config files."""
    return [path for path in files() if path.endswith('.py') and not path.startswith(('tests/', 'config/'))]

def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()

def lines(*paths):
    return sum(len(read(path).splitlines()) for path in paths)

def module_of(path):
    return path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')

def imports():
    """Return {module: the modules of this repository that it imports, anywhere in its file}."""
    paths = {module_of(path): path for path in source() if path.endswith('.py')}
    graph = {}
    for module, path in paths.items():
        named = set()
        for node in ast.walk(ast.parse(read(path), path)):
            if isinstance(node, ast.Import):
                named.update(alias.name for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: an import that does not say from where"
                named.update(f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in paths else node.module
                             for alias in node.names)
        graph[module] = (named & paths.keys()) - {module}
    return graph

def circle_in(graph):
    """Return the modules of an import circle, [] where there is none."""
    done, trail = set(), []

    def walk(module):
        if module in trail:
            return trail[trail.index(module):] + [module]
        if module in done:
            return []
        trail.append(module)
        found = next((circle for other in sorted(graph[module]) if (circle := walk(other))), [])
        trail.pop()
        done.add(module)
        return found

    return next((circle for module in sorted(graph) if (circle := walk(module))), [])

def test_circles_are_found():
    """The search itself, on graphs by hand."""
    assert circle_in(dict(a={'b'}, b={'c'}, c=set(), d={'a', 'c'})) == []
    assert circle_in(dict(a={'b'}, b={'c', 'd'}, c=set(), d={'b'})) == ['b', 'd', 'b']

def test_imports_are_found():
    """Among them those inside of functions, and a module that is named by `from`."""
    graph = imports()
    assert {'common.options', 'common.records'} <= graph['common.weights']
    assert 'common.weights' in graph['model'] and 'common.run' in graph['common.training']
    assert 'common.options' in graph['ppo'] and 'data.toy.world' in graph['data.toy.prepare']

def test_no_import_circle():
    assert circle_in(imports()) == []

def test_arrows_run_one_way():
    """Scripts know the plumbing, which knows no script, no data set and no experiment."""
    graph = imports()
    scripts = {module for module in graph if '.' not in module} - {'model', 'common'}
    for module, others in graph.items():
        folder = module.split('.')[0]
        allowed = dict(model={'common'}, common={'common', 'model'}, feedback={'feedback', 'common', 'model'})
        if folder in allowed:
            assert {other.split('.')[0] for other in others} <= allowed[folder], (module, others)
        if folder not in MAY_IMPORT_SCRIPTS:
            assert not others & scripts, (module, others & scripts)

def test_what_lies_at_the_top():
    """The model, and what one types after `python`."""
    top = [path for path in source() if '/' not in path]
    assert len(top) <= 14, top
    for path in top:
        assert path == 'model.py' or "if __name__ == '__main__':" in read(path), path

def test_torch_is_imported_last():
    """common/__init__.py tells OpenMP's threads how to wait, and torch reads that when it is first imported."""
    folders = {path.split('/')[0].removesuffix('.py') for path in source()}
    late = [path for path in source() if path.split('/')[0] not in ('common', 'feedback', 'data')]
    for path in late:
        names = [(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split('.')[0]
                 for node in ast.parse(read(path)).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        own = [i for i, name in enumerate(names) if name in folders]
        assert not own or 'torch' not in names or own[0] < names.index('torch'), path

def test_sizes():
    core = ['model.py', *(f"{script}.py" for script in CORE_SCRIPTS), *(p for p in source() if p.startswith('common/'))]
    sizes = {'model.py': lines('model.py'), 'ppo.py': lines('ppo.py'), 'the core': lines(*core),
             'the rest': lines(*(p for p in source() if p not in core and not p.startswith(('lab/', 'lessons/'))))}
    limits = {'model.py': 430, 'ppo.py': 310, 'the core': 4300, 'the rest': 6000}
    assert all(sizes[name] <= limits[name] for name in limits), sizes

def first_sentence(docstring):
    """Return its words: up to the first full stop, colon or semicolon, without shapes and what is in brackets."""
    text = ' '.join(docstring.strip().split('\n\n')[0].split())
    while re.search(r'\([^()]*\)', text):
        text = re.sub(r'\([^()]*\)', '', text)
    text = re.split(r'[.:;](?: |$)', text)[0]
    return [word for word in text.split() if re.search(r'[^\W\d_]', word)]

@pytest.mark.parametrize('docstring, expected', [
    ('Return the mean.', 3), ('Return the sum () of x (B, T-1), and y; both (B, K). More.', 7),
    ('\n    Stack rows\n    as one: 1.\n\n    More.', 4), ('Wait 0.5 s (at most (really))', 2)])
def test_first_sentences_are_counted(docstring, expected):
    assert len(first_sentence(docstring)) == expected

@pytest.mark.parametrize('path', [path for path in source() if path.endswith('.py')])
def test_docstrings_begin_with_a_short_sentence(path):
    """At most twelve words, of functions and methods that others call."""
    functions = [node for node in ast.walk(ast.parse(read(path), path))
                 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith('_')]
    said = [(f"{path}:{node.lineno}", first_sentence(ast.get_docstring(node) or '')) for node in functions]
    assert [(where, len(words), ' '.join(words)) for where, words in said if len(words) > 12] == []

@pytest.mark.parametrize('path', [path for path in files() if path.endswith(('.py', '.html'))])
def test_lines_are_at_most_120_columns_wide(path):
    long = [n for n, line in enumerate(read(path).splitlines(), 1) if len(line) > 120]
    assert not long, f"{path}: lines {long}"
