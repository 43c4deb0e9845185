#!/usr/bin/env bash
# The first hour with a model and data of one's own, by the public commands only: an empty folder, a store, a checkpoint,
# images, requests, a sweep, the way out, and the way back. Each step is followed by what a user would check.
#
#     lab/studies/first_use.sh [FOLDER]        # default: a new temporary folder, deleted at the end
#
# Prints each command after `$ `, what it printed, and a line `check: ...` for each check; ends with 1 at the first check
# that fails. PORT chooses the port of the store. docs/tutorials/own-model.md is this script in prose:
# tests/e2e/test_first_use.py runs it and compares the page with what it prints.
set -euo pipefail
export CHECKOUT COLUMNS=110 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} SALUN_ACTOR=ann
CHECKOUT=$(cd "$(dirname "$0")/../.." && pwd)
for name in "${!AWS_@}" "${!SALUN_S3_@}" SALUN_STORE_URI SALUN_SIGNING_KEY SALUN_CONFIG; do unset "$name"; done  # of another store
command -v salun >/dev/null || export PATH=$CHECKOUT/.venv/bin:$PATH

folder=${1:-} server=''
finish() {
    if [ -n "$server" ]; then kill "$server" 2>/dev/null && wait "$server" || true; fi
    if [ -z "${1:-}" ]; then rm -rf "$folder"; fi
}
trap 'finish "${1:-}"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
folder=${folder:-$(mktemp -d)}
mkdir -p "$folder"
cd "$folder"
[ -z "$(ls -A)" ] || { echo "$folder is not empty: give an empty folder" >&2; exit 2; }

# Run a command as it is shown; $output and $code hold what it printed and its exit code. An exit code other than the
# second argument (0) ends the script.
step() {
    printf '\n$ %s\n' "$1"
    code=0
    output=$(eval "$1" 2>stderr.log) || code=$?
    errors=$(<stderr.log)
    rm stderr.log
    printf '%s\n' "$output"
    [ "$code" = 0 ] || printf '%s\n' "$errors"
    [ "$code" = "${2:-0}" ] || { printf '%s\nFAILED: exit code %s, not %s\n' "$errors" "$code" "${2:-0}" >&2; exit 1; }
}
check() {
    local what=$1
    shift
    if "$@"; then printf 'check: %s\n' "$what"; else printf 'FAILED: %s\n' "$what" >&2; exit 1; fi
}
prints() { grep -qE -- "$1" <<<"$output"; }
explains() { grep -qE -- "$1" <<<"$errors" && [ "$(grep -c . <<<"$errors")" = 1 ]; }
file() { [ -s "$1" ]; }

# 1. What a user brings along
step 'python "$CHECKOUT/lab/studies/first_use_model.py"'
check 'there are images in folders 1 to 6 and a checkpoint' file resnet20.th

# 2. A store
printf '\n$ salun store serve store\n'
salun store serve store ${PORT:+--port "$PORT"} >serve.log 2>&1 &
server=$!
for _ in $(seq 300); do
    if grep -q 'until Ctrl-C' serve.log || ! kill -0 "$server" 2>/dev/null; then break; fi
    sleep 0.2
done
output=$(<serve.log)
rm serve.log
printf '%s\n' "$output"
check 'the store is served, and says how to use it' prints 'set -a; \. .*/store/\.env; set \+a'
check 'only its owner can read the keys' test "$(stat -c %a store/.env)" = 600

# 3. The settings
step "printf 'source: images\nvalidation_fraction: 0\n' > data.yaml"
step 'salun init --line marks --data data.yaml --signing-key keys/salun.pem'
check 'the settings name the keys of the store that was just started' grep -q '^env_file: store/\.env$' salun.yaml
step 'salun key create --out keys/salun'

# 4. The model
step 'salun model import resnet20.th --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --line marks --out base'
check 'the layout was recognised' prints '^layout +akamaster'
check 'the accuracy is what the model had elsewhere' prints '^train accuracy +(0\.99|1\.0)'
check 'it is the first version of the line' prints '^version +[0-9a-f]{64}$'

# 5. Requests
step 'salun request submit --id r-1 --class 1' 2
check 'a number that may be the name or the index of a class is refused' explains 'class 1 is ambiguous.*--class-name'
step 'salun request submit --id r-1 --class-name 1'
check 'the folder 1 was matched, which is the class with index 0' prints '^r-1 .* class 0: 1 +120 +96 '
step 'salun request submit --id r-2 --samples train/2/001.png,train/3/002.png'
check 'both samples were found in the training data' prints '^r-2 .* 2 samples +2 +2 '
step 'salun request submit --id r-3 --samples train/2/999.png'
check 'an unknown id is named before it is filed' prints '^r-3 .* 1 not in the data: held for review'

# 6. Erase now
step 'salun sweep --now'
check 'both requests are erased in one run that passed the gate' prints 'settled +r-2: completed: unlearned'
check 'a new version is published' prints '^published +marks@[0-9a-f]{12}$'
version=$(sed -n 's/^published *marks@//p' <<<"$output")
step 'salun request list'
check 'the unknown id was not certified: it waits for a person' prints '^r-3 .* on_hold: unmatched '

# 7. The way out
step 'salun model pull marks --out new'
check 'the folder holds the new version' prints "^version +$version"
step 'salun model export new --to onnx --out new.onnx'
check 'the file was compared with the model by onnxruntime' prints '^checked by +onnxruntime'
step 'python "$CHECKOUT/lab/studies/first_use_model.py" new.onnx'
check 'the ONNX file no longer names the images of class 1' prints '^class 1 +[0-9]% '
check 'it still names those of class 2' prints '^class 2 +(9.|100)% '

# 8. The certificate
step 'salun certificate r-1 --out r-1.json'
step 'salun verify r-1.json --key keys/salun.pub --model new'
check 'the certificate is valid' prints '^VALID: signed by a trusted key'
check 'the pulled files are those that it certifies' prints '^all [0-9]+ files of new are the certified ones'

# 9. The way back
step 'salun model history marks'
first=$(sed -n 's/^\([0-9a-f]\{12\}\) *import .*/\1/p' <<<"$output")
step "salun model rollback marks@$first --reason 'accuracy fell'" 4
check 'a rollback past an erasure is refused' explains 'reopen'
step "salun model rollback marks@$first --reason 'accuracy fell' --reopen"
check 'the requests are queued again' prints '^reopened requests +2$'
step 'salun model history marks'
check 'the history keeps the undone version' prints "^$version undone "
check 'and says who undid it and why' prints "^undone: $version, .* by ann, .*: accuracy fell"
step 'salun request show r-1'
check 'the request waits for the next sweep' prints '^r-1: queued, '
step 'salun verify r-1.json --key keys/salun.pub --store s3://salun' 5
check 'the certificate says that its version was undone' explains 'was rolled back .* by ann .*: accuracy fell'
check 'and what to do' explains 'fetch its new certificate: salun certificate r-1'
printf '\nall checks hold\n'
