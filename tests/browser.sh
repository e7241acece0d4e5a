#!/usr/bin/env bash
# Installs the Chromium that tests/browser.py drives, on Debian and Ubuntu, where there is none.
set -euo pipefail
if command -v chromium chromium-browser > /dev/null; then exit 0; fi
sudo=$([ "$(id -u)" = 0 ] || echo sudo)
$sudo apt-get update -qq
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq chromium > /dev/null
