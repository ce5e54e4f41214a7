#!/usr/bin/env bash
# `e2e/fuzz.sh [SECONDS [TARGET...]]`: runs the fuzz targets of cni-bin/fuzz, each over its corpus and then
# for some seconds (3) over inputs that it makes up. An input that breaks a property is left in
# cni-bin/fuzz/artifacts: mend the code, and keep the input in corpus/TARGET under a name that says what it is.
# Needs nightly Rust and a C++ compiler; without them the corpus alone is checked, by an ordinary test.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${1:-3}; (( $# )) && shift
version=0.13.2
tools=$PWD/target/fuzz/tools
export PATH=$tools/bin:$PATH

# without REASON: says why nothing is made up, and checks what there is.
without() {
  echo "fuzz: $1: only the corpus is checked"
  exec cargo test -p plat-cni --test corpus
}

cargo +nightly --version >/dev/null 2>&1 || without "no nightly Rust (rustup toolchain install nightly)"
command -v c++ >/dev/null || without "no C++ compiler (apt-get install g++)"
[[ $(cargo-fuzz --version 2>/dev/null) == "cargo-fuzz $version" ]] ||
  cargo install --quiet --locked --root "$tools" "cargo-fuzz@$version" || without "cargo-fuzz cannot be installed"

cd cni-bin/fuzz
cargo +nightly fetch --quiet --locked ||
  { echo "fuzz: cni-bin/fuzz/Cargo.lock does not fit: run 'cargo update --workspace' there" >&2; exit 1; }
targets=("$@"); (( $# )) || mapfile -t targets < <(cd fuzz_targets && printf '%s\n' *.rs | sed 's/\.rs$//')
# No sanitizer: nothing here is unsafe, and without one it runs twice as often.
options=(--sanitizer none --target-dir "$tools/..")
mkdir -p "$tools"
cargo +nightly fuzz build "${options[@]}" 2>"$tools/build.log" || { cat "$tools/build.log" >&2; exit 1; }

made_up=$(mktemp -d); trap 'rm -rf "$made_up"' EXIT
passed=0 failed=0
for target in "${targets[@]}"; do
  mkdir "$made_up/$target"
  # Into the first folder goes what is new.
  if cargo +nightly fuzz run "${options[@]}" "$target" "$made_up/$target" "corpus/$target" -- \
      -max_total_time="$seconds" -max_len=4096 -timeout=60 -dict=json.dict -print_final_stats=1 >"$made_up/log" 2>&1; then
    passed=$((passed + 1))
    echo "fuzz: $target: $(awk '/number_of_executed_units/ { print $2 }' "$made_up/log") runs"
  else
    failed=$((failed + 1))
    echo "fuzz: $target: FAILED"; grep -av '^#' "$made_up/log" | tail -60
  fi
done
echo "$passed passed, $failed failed"
exit $((failed > 0))
