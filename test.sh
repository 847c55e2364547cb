#!/usr/bin/env bash
# Passes the tests: unit, golden and end-to-end on the release build, then the unit suite under address and
# undefined-behaviour sanitizers. `./test.sh unit|e2e|asan` runs one part.
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"

PART="${1:-all}"
cd "$TANDEM_ROOT"
need_packages "${BUILD_PACKAGES[@]}"

run_ctest() { ctest --test-dir "$1" --output-on-failure -j 2 "${@:2}"; }

if [ "$PART" = all ] || [ "$PART" = unit ]; then
  build_preset release
  say "unit and golden tests"
  run_ctest build
fi

if [ "$PART" = all ] || [ "$PART" = e2e ]; then
  build_preset release tandem
  need_packages "${TEST_PACKAGES[@]}"
  need_python
  say "end-to-end tests: real processes, real sockets, the real openai client"
  .venv/bin/python -m pytest -q -p no:cacheprovider tests/e2e
fi

if [ "$PART" = all ] || [ "$PART" = asan ]; then
  build_preset asan
  say "unit tests under address and undefined-behaviour sanitizers"
  ASAN_OPTIONS=detect_leaks=1:abort_on_error=0 LSAN_OPTIONS=suppressions="$TANDEM_ROOT/cmake/lsan.supp" \
    run_ctest build-asan
fi
say "all tests passed"
