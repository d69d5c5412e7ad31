"""README.zh.md says the same as README.md: the same commands, links, figures and rows, whatever the words."""
import os
import re

import pytest

from tiny import ROOT

def read(name):
    with open(os.path.join(ROOT, name), encoding='utf-8') as f:
        return f.read()

def blocks(text):
    """Return the lines of all code blocks, less their comments."""
    return [[re.sub(r'\s+# .*', '', line) for line in block.splitlines()]
            for block in re.findall(r'```\n(.*?)```', text, re.DOTALL)]

def figures(text):
    """Return the numbers outside code blocks and links, in any order."""
    text = re.sub(r'```.*?```|\]\([^)]*\)', '', text, flags=re.DOTALL)
    return sorted(re.findall(r'\d+(?:\.\d+)?', text))

def inline_code(text):
    return sorted(set(re.findall(r'`([^`\n]+)`', re.sub(r'```.*?```', '', text, flags=re.DOTALL))))

def links(text):
    found = set(re.findall(r'\]\(([^)]*)\)', text)) - {'README.md', 'README.zh.md'}
    return sorted(link.replace('/README.zh.md', '/README.md') for link in found)

@pytest.mark.parametrize('parts', [blocks, figures, inline_code, links])
def test_both_front_pages_agree(parts):
    assert parts(read('README.md')) == parts(read('README.zh.md'))

def test_tables_have_the_same_rows():
    rows = lambda text: [line.count('|') for line in text.splitlines() if line.startswith('|')]
    assert rows(read('README.md')) == rows(read('README.zh.md'))

def test_sections_follow_in_the_same_order():
    depth = lambda text: [line.split()[0] for line in text.splitlines() if line.startswith('#')]
    assert depth(read('README.md')) == depth(read('README.zh.md'))
