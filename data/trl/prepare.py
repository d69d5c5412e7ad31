"""Prepare your own preferences, or a data set in TRL's formats and many others.

    python data/trl/prepare.py --source=preferences.jsonl --out_dir=data/mine
    python data/trl/prepare.py --repo=OWNER/NAME --file=PATH/train.jsonl --out_dir=data/mine      # from the hub

Row by row it tells the formats of data/formats.py apart, most of https://huggingface.co/docs/trl/dataset_formats among
them; docs/data.md lists their keys and the records that they give. Texts may be strings ("standard") or lists of
messages ("conversational"). A string is a user's turn or an answer, and is put into the template of common/tokens.py.
Chosen and rejected may differ in their last answer only. They may be whole conversations, as in UltraFeedback's
binarised form.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import launch, require
from data.formats import parse_row
from data.prepare_common import PrepareOptions, prepare

@dataclass
class Config(PrepareOptions):
    repo: str = '' # a data set on the hub, as OWNER/NAME
    file: str = '' # its file
    out_dir: str = 'data/trl' # where the records go

    def __post_init__(self):
        super().__post_init__()
        require(self, source=(self.source != '' or (self.repo and self.file),
                              'a file or folder, or else --repo and --file of the hub'))

def main(cfg):
    prepare(cfg, parse_row, cfg.repo, [cfg.file])

if __name__ == '__main__':
    launch(main, Config)
