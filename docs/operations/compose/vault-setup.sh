#!/usr/bin/env bash
# Initialises and unseals the Vault of docker-compose.yml, makes the key of region eu
# and the smallest policy for it, and gives coffer an AppRole to log in with. It runs
# at every start: the first time it does all of this, later it unseals.
#
# usage: vault-setup.sh VAULT_URL AUTHORITY_DIR COFFER_DIR
#
# The unseal key stays in AUTHORITY_DIR, which no other service mounts. The root token
# is revoked at the end of the first run. No secret is an argument of a program: curl
# reads them from its standard input.
set -euo pipefail
umask 077

vault=$1 authority=$2 coffer=$3
policy=$(dirname "$0")/coffer-policy.hcl

# call METHOD PATH [JSON]: prints the answer; fails on an HTTP error.
token=""
call() {
  printf '%s' "${3:-}" >"$authority/body"
  printf 'header = "X-Vault-Token: %s"\n' "$token" |
    curl -sS --fail-with-body --config - --cacert "$authority/ca.pem" \
      --request "$1" --data-binary "@$authority/body" "$vault/v1/$2"
}
trap 'rm -f "$authority/body"' EXIT

# field NAME: the string of that name in the JSON on standard input.
field() { sed -n 's/.*"'"$1"'":\[\{0,1\}"\([^"]*\)".*/\1/p'; }

# status: initialized and sealed, as Vault's health tells without a token.
status() { curl -sS --cacert "$authority/ca.pem" "$vault/v1/sys/seal-status"; }

for ((i = 0; ; i++)); do
  state=$(status 2>/dev/null) && break
  ((i < 300)) || { echo "vault-setup: no answer from $vault" >&2; exit 1; }
  sleep 0.2
done

if [[ $state == *'"initialized":false'* ]]; then
  answer=$(call PUT sys/init '{"secret_shares":1,"secret_threshold":1}')
  field keys_base64 <<<"$answer" >"$authority/vault.unseal"
  field root_token <<<"$answer" >"$authority/vault.root"
fi
if [[ $(status) == *'"sealed":true'* ]]; then
  call PUT sys/unseal '{"key":"'"$(<"$authority/vault.unseal")"'"}' >/dev/null
fi
# Unsealed is not yet active.
for ((i = 0; ; i++)); do
  [[ $(curl -s -o /dev/null -w '%{http_code}' --cacert "$authority/ca.pem" "$vault/v1/sys/health") != 200 ]] || break
  ((i < 300)) || { echo "vault-setup: $vault does not become active" >&2; exit 1; }
  sleep 0.2
done

# The root token is there until everything below has been done once.
[[ -s $authority/vault.root ]] || exit 0
token=$(<"$authority/vault.root")

# Each step may have been done by a run that was interrupted.
[[ $(call GET sys/mounts) == *'"transit/"'* ]] || call POST sys/mounts/transit '{"type":"transit"}'
# Derived, so that every wrapped key is bound to its app and region. Making a key that
# exists changes nothing.
call POST transit/keys/coffer-eu '{"type":"aes256-gcm96","derived":true}' >/dev/null
text=$(sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' "$policy" | sed -e ':a' -e 'N' -e '$!ba' -e 's/\n/\\n/g')
call PUT sys/policies/acl/coffer '{"policy":"'"$text"'"}'
[[ $(call GET sys/auth) == *'"approle/"'* ]] || call POST sys/auth/approle '{"type":"approle"}'
call POST auth/approle/role/coffer '{"token_policies":["coffer"],"token_ttl":"1h","token_max_ttl":"24h"}'

call GET auth/approle/role/coffer/role-id | field role_id >"$coffer/vault.role"
call POST auth/approle/role/coffer/secret-id | field secret_id >"$coffer/vault.secret"
[[ -s $coffer/vault.role && -s $coffer/vault.secret ]] || { echo "vault-setup: no AppRole credentials" >&2; exit 1; }
[[ -z ${COFFER_UID:-} ]] || chown "$COFFER_UID" "$coffer/vault.role" "$coffer/vault.secret"

call POST auth/token/revoke-self
rm "$authority/vault.root"
