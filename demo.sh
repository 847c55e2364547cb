#!/usr/bin/env bash
# Sets up this machine, then serves the demo model with one prefill worker, one decode worker and a router.
#   ./demo.sh           stays up and prints the address
#   ./demo.sh --check   asks one question through both workers, prints the answer, and exits
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"

CHECK=no
case "${1:-}" in
  "") ;;
  --check) CHECK=yes ;;
  *) fail "unknown argument '$1'; use ./demo.sh or ./demo.sh --check" ;;
esac

cd "$TANDEM_ROOT"
need_packages "${BUILD_PACKAGES[@]}"
build_preset release tandem

# As examples/local-1p1d.yaml has them.
ROUTER_PORT=8000
PREFILL_PORT=8100
DECODE_PORT=8200
QUESTION="Psalm 23:1"

# http_get <port> <path>: prints the response with its head; fails if nobody listens.
http_get() {
  exec 3<>"/dev/tcp/127.0.0.1/$1" || return 1
  printf 'GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' "$2" >&3
  cat <&3
  exec 3>&-
}
is_ready() { http_get "$1" /health 2>/dev/null | head -n 1 | grep -q ' 200 '; }
# Sum of a metric of one worker.
metric() { http_get "$1" /metrics | awk -v name="$2" 'index($1, name "{") == 1 {sum += $NF} END {printf "%d", sum}'; }

for port in "$ROUTER_PORT" "$PREFILL_PORT" "$DECODE_PORT"; do
  ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || fail "port $port is in use; stop the program that listens on it"
done

say "starting the cluster of examples/local-1p1d.yaml"
build/tandem up examples/local-1p1d.yaml &
UP=$!
stop() { kill -INT "$UP" 2>/dev/null || true; wait "$UP" 2>/dev/null || true; }
trap stop EXIT
trap 'exit 130' INT TERM

for _ in $(seq 600); do
  kill -0 "$UP" 2>/dev/null || fail "the cluster ended; its logs are in run/"
  is_ready "$ROUTER_PORT" && is_ready "$PREFILL_PORT" && is_ready "$DECODE_PORT" && break
  sleep 0.1
done
kill -0 "$UP" 2>/dev/null || fail "the cluster ended, while another program answers on its ports; its logs are in run/"
is_ready "$ROUTER_PORT" || fail "the router was not ready after 60 s; the logs are in run/"

say "asking \"$QUESTION\" through both workers"
prompts_before="$(metric "$PREFILL_PORT" vllm:prompt_tokens_total)"
tokens_before="$(metric "$DECODE_PORT" vllm:generation_tokens_total)"
printf '%s\n' "$QUESTION" | build/tandem chat "http://127.0.0.1:$ROUTER_PORT" --temperature 0 --stats
prompts=$(($(metric "$PREFILL_PORT" vllm:prompt_tokens_total) - prompts_before))
tokens=$(($(metric "$DECODE_PORT" vllm:generation_tokens_total) - tokens_before))
[ "$prompts" -gt 0 ] && [ "$tokens" -gt 0 ] || fail "the answer did not pass through both workers"
printf 'prefill on port %s computed %s prompt tokens, decode on port %s generated %s tokens\n' \
  "$PREFILL_PORT" "$prompts" "$DECODE_PORT" "$tokens"
[ "$CHECK" = yes ] && exit 0

say "serving on http://127.0.0.1:$ROUTER_PORT/v1 until Ctrl-C; logs are in run/"
cat <<HELP
  curl http://127.0.0.1:$ROUTER_PORT/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "tandem-demo", "messages": [{"role": "user", "content": "John 3:16"}]}'
  build/tandem chat http://127.0.0.1:$ROUTER_PORT
HELP
wait "$UP"
