#!/usr/bin/env bash
# The numerics tests as other processors, other PyTorchs and other Pythons run them: one line for each column.
#
#   tests/everywhere.sh                   every column
#   tests/everywhere.sh default avx2      these columns
#   TESTS="tests/test_model.py" ...       other tests than NUMERICS below
#   PYTHON=... ...                        the interpreter of the columns that change settings only (python3)
#
# A column in another environment takes the interpreter in TORCH29, PYTHON310 or PYTHON313 (with the package's
# dependencies and pytest). Where the variable is empty, it makes a virtual environment under ENVIRONMENTS (a temporary
# folder) with pip, for which python3.10 and python3.13 must be there. What a column printed is kept in LOGS (a temporary
# folder, named at the end if any column fails). Exit status 1 if a column failed.
set -uo pipefail
cd "$(dirname "$0")/.."

NUMERICS="model sample infill speculate evaluate objective compress exact artifact entropy quantize optim train distributed survival"
TESTS=${TESTS:-$(printf 'tests/test_%s.py ' $NUMERICS)}
COLUMNS_ALL="default avx2 onednn-sse41 onednn-avx2 mkl-compatible threads-1 threads-2 threads-4 torch-2.9 python-3.10 python-3.13"
LOGS=${LOGS:-$(mktemp -d)}
PYTHON=${PYTHON:-python3}
mkdir -p "$LOGS"

# interpreter VARIABLE PYTHON REQUIREMENT: the interpreter of a column, made where the variable is empty.
interpreter() {
  if [ -n "${!1:-}" ]; then
    echo "${!1}"
    return
  fi
  ENVIRONMENTS=${ENVIRONMENTS:-$(mktemp -d)}
  local folder="$ENVIRONMENTS/$1"
  [ -x "$folder/bin/python" ] || "$2" -m venv "$folder" || return 1
  "$folder/bin/pip" install --quiet "$3" . pytest hypothesis regex brotli zstandard huggingface_hub starlette uvicorn 1>&2 || return 1
  echo "$folder/bin/python"
}

# column NAME INTERPRETER [VARIABLE=VALUE...]
column() {
  local name=$1 python=$2 begin=$SECONDS log="$LOGS/$1.txt" verdict=FAIL
  shift 2
  if [ -z "$python" ]; then
    echo "FAIL $name: no interpreter"
    return 1
  fi
  # torch.compile keeps what it made for one kind of processor, and its cache does not know of ATEN_CPU_CAPABILITY: code for
  # wider vectors than the column has would be run, and write beyond its arrays. So each column has a cache of its own.
  # shellcheck disable=SC2086 # TESTS is a list
  env TORCHINDUCTOR_CACHE_DIR="$LOGS/compiled-$name" OMP_NUM_THREADS=1 PYTHONPATH="src:tests:${PYTHONPATH:-}" "$@" \
    "$python" -m pytest -o addopts= -q -p no:cacheprovider $TESTS > "$log" 2>&1 && verdict=PASS
  echo "$verdict $name: $(tail -n 1 "$log" | sed -E 's/=+//g; s/ in [0-9.]+s.*//; s/^ +| +$//g'), $((SECONDS - begin)) s"
  [ $verdict = PASS ] || grep -E '^(FAILED|ERROR)' "$log"
  [ $verdict = PASS ]
}

failed=0
for name in ${*:-$COLUMNS_ALL}; do
  case $name in
    default) column "$name" "$PYTHON" ATEN_CPU_CAPABILITY=default ;;
    avx2) column "$name" "$PYTHON" ATEN_CPU_CAPABILITY=avx2 ;;
    onednn-sse41) column "$name" "$PYTHON" ONEDNN_MAX_CPU_ISA=SSE41 ;;
    onednn-avx2) column "$name" "$PYTHON" ONEDNN_MAX_CPU_ISA=AVX2 ;;
    mkl-compatible) column "$name" "$PYTHON" MKL_CBWR=COMPATIBLE ;;
    threads-*) column "$name" "$PYTHON" "OMP_NUM_THREADS=${name#threads-}" ;;
    torch-2.9) column "$name" "$(interpreter TORCH29 "$PYTHON" 'torch==2.9.*')" ;;
    python-3.10) column "$name" "$(interpreter PYTHON310 python3.10 torch)" ;;
    python-3.13) column "$name" "$(interpreter PYTHON313 python3.13 torch)" ;;
    *) echo "unknown column $name; known: $COLUMNS_ALL"; exit 2 ;;
  esac || failed=1
done
[ $failed = 0 ] || echo "what the columns printed: $LOGS"
exit $failed
