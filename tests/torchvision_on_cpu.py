"""Lets torchvision import beside a CPU build of torch; run by the interpreter whose torchvision it is.

It announces two compiled operators that are then not there, and fails to import. The processors of the
Qwen-VL family import it but use neither.
"""

import pathlib
import sysconfig

path = pathlib.Path(sysconfig.get_path("purelib")) / "torchvision" / "_meta_registrations.py"
gone = {f'@torch.library.register_fake("torchvision::{name}")' for name in ("nms", "qnms")}
kept = [line for line in path.read_text().splitlines() if line.strip() not in gone]
path.write_text("\n".join(kept) + "\n")
