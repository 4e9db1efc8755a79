#!/usr/bin/env bash
# A release in continuous integration, whichever: .ci/release.sh RECIPE [TARGET]
#
# RECIPE is released in WORKSPACE (default: release). Killed at any moment, or on another machine that was given the
# folder, the same command goes on where it was: keep the folder between jobs. TARGET (hf://org/name, …) is published
# to afterwards, if it is given. The gates stand in JUNIT, the report is appended to SUMMARY.
#
# SIGNING_KEY_FILE names the private key (its .pub beside it), PACKAGER_KEY_PASSPHRASE opens it. For the hub: HF_TOKEN,
# or HF_OIDC_RESOURCE (and HF_OIDC_ID_TOKEN outside GitHub) for a trusted publisher.
set -euo pipefail

recipe=${1:?usage: .ci/release.sh RECIPE [TARGET]}
target=${2:-}
workspace=${WORKSPACE:-release}

key=()
if [ -n "${SIGNING_KEY_FILE:-}" ]; then key=(--signing-key "$SIGNING_KEY_FILE"); fi
packager release "$recipe" --workspace "$workspace" "${key[@]}" \
  --junit "${JUNIT:-junit.xml}" --summary "${SUMMARY:-summary.md}"
if [ -n "$target" ]; then packager publish "$workspace/bundle" "$target"; fi
