# SPDX-License-Identifier: Apache-2.0
"""Look into Linux wheels, or extension modules: what is exported, what is needed, and from where.

    python shipping/check_wheel.py FILE...

Each extension must export PyInit__core and nothing else, need nothing but the C library, search no folder for it, ask
for no executable stack, and call nothing that writes files, loads code, opens sockets or starts processes. Needs
pyelftools.
"""

import io
import sys
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

EXPORTED = {"PyInit__core"}
# The parts of glibc; in musl all are one file, and the loader belongs to either.
C_LIBRARY = ("libc.so.6", "libm.so.6", "libpthread.so.0", "librt.so.1", "libc.musl-", "libc.so", "ld-linux")
# What SECURITY.md says that the extension does not do; fopen() it may call, to read how many CPUs there are.
NEVER_CALLED = {
    "open", "open64", "openat", "creat", "fwrite", "fputs", "fprintf", "mkstemp", "rename", "unlink", "remove",
    "dlopen", "dlsym", "mprotect", "socket", "connect", "bind", "accept", "sendto", "recvfrom", "getaddrinfo",
    "fork", "vfork", "clone", "posix_spawn", "posix_spawnp", "execve", "execvp", "execl", "system", "popen",
}  # fmt: skip


def extensions(path):
    """The name and content of every shared object in a wheel, or of the one that `path` is."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if ".so" in Path(name).suffixes)
    else:
        yield path.name, path.read_bytes()


def faults(content):
    """What is wrong with one shared object, in words."""
    elf = ELFFile(io.BytesIO(content))
    symbols = list(elf.get_section_by_name(".dynsym").iter_symbols())
    exported = {
        symbol.name
        for symbol in symbols
        if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_LOCAL" and symbol.name
    }
    if exported != EXPORTED:
        yield f"exports {sorted(exported)}"
    called = {symbol.name for symbol in symbols if symbol["st_shndx"] == "SHN_UNDEF"}
    if called & NEVER_CALLED:
        yield f"calls {sorted(called & NEVER_CALLED)}"
    for tag in elf.get_section_by_name(".dynamic").iter_tags():
        if tag.entry.d_tag == "DT_NEEDED" and not tag.needed.startswith(C_LIBRARY):
            yield f"needs {tag.needed}"
        elif tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
            yield f"searches {getattr(tag, 'rpath', None) or tag.runpath}"
        elif tag.entry.d_tag == "DT_TEXTREL":
            yield "has code that the loader must write to"
    for segment in elf.iter_segments("PT_GNU_STACK"):
        if segment["p_flags"] & 1:
            yield "asks for an executable stack"


def main(paths):
    """Print what was found; 1 if something is wrong, or if there was nothing to look at."""
    found = [(path, name, list(faults(content))) for path in map(Path, paths) for name, content in extensions(path)]
    for path, name, wrong in found:
        print(f"{path.name}: {name} {'; '.join(wrong) or 'is as it should be'}")
    return int(not found or any(wrong for _, _, wrong in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
