#!/usr/bin/env bash
# Prints docs/actors.md from the four header lines of each actor's file; `--check` compares instead.
set -euo pipefail
cd "$(dirname "$0")/.."

list() {
  echo "# Actors"
  echo
  echo "Made from the headers in \`src/actors\` by \`scripts/actors.sh\`."
  for file in src/actors/*.rs; do
    grep -q '^//! owns:' "$file" || continue
    printf '\n## %s\n\n' "$(basename "$file" .rs)"
    # The first line, then the four, continued lines joined.
    awk '/^\/\/!/ { sub(/^\/\/! ?/, ""); print; next } { exit }' "$file" | awk '
      NR == 1 { print $0; print ""; next }
      /^(owns|hears|says|restart story):/ { if (line) print line; i = index($0, ":"); line = "- **" substr($0, 1, i - 1) "**" substr($0, i); next }
      /^$/ { if (line) print line; line = ""; next }
      line { line = line " " $0 }
      END { if (line) print line }'
  done
}

case "${1:-}" in
  --check) diff -u docs/actors.md <(list) || { echo "docs/actors.md is old: run scripts/actors.sh > docs/actors.md" >&2; exit 1; } ;;
  *) list ;;
esac
