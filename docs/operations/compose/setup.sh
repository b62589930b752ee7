#!/usr/bin/env bash
# Makes what the services of docker-compose.yml trust each other by: a certificate
# authority, a certificate for each server, NATS's user and the operators' token.
# What is there already is kept, so it can run at every start.
#
# usage: setup.sh AUTHORITY_DIR NATS_DIR VAULT_DIR COFFER_DIR
#
# The authority's key stays in AUTHORITY_DIR, which no server mounts. COFFER_UID and
# VAULT_UID, if set, become the owners of what those two read.
set -euo pipefail
umask 077

authority=$1 nats=$2 vault=$3 coffer=$4
mkdir -p "$authority" "$nats" "$vault" "$coffer"

# Nothing is printed that openssl has to say unless it fails.
quietly() {
  local log
  log=$("$@" 2>&1) || { printf '%s\n' "$log" >&2; return 1; }
}

if [[ ! -s $authority/ca.pem ]]; then
  quietly openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -sha256 -days 3650 \
    -subj "/CN=Coffer compose authority" -addext "keyUsage=critical,keyCertSign,cRLSign" \
    -keyout "$authority/ca.key" -out "$authority/ca.pem"
fi

# certificate NAME DIR: for the service of that name, and for the machine itself.
certificate() {
  local name=$1 dir=$2
  [[ ! -s $dir/$name.pem ]] || return 0
  quietly openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -sha256 \
    -subj "/CN=$name" -keyout "$dir/$name.key" -out "$dir/$name.csr"
  quietly openssl x509 -req -sha256 -days 825 -in "$dir/$name.csr" -out "$dir/$name.pem.new" \
    -CA "$authority/ca.pem" -CAkey "$authority/ca.key" -extfile <(
      echo "subjectAltName=DNS:$name,DNS:localhost,IP:127.0.0.1"
      echo "keyUsage=critical,digitalSignature"
      echo "extendedKeyUsage=serverAuth"
    )
  rm "$dir/$name.csr"
  mv "$dir/$name.pem.new" "$dir/$name.pem"
}
certificate nats "$nats"
certificate vault "$vault"
certificate coffer "$coffer"

# Both sides of NATS's one user, the client's last: it is what says "done".
if [[ ! -s $coffer/nats.user ]]; then
  password=$(openssl rand -hex 32)
  printf 'user: coffer\npassword: "%s"\n' "$password" >"$nats/user.conf"
  printf 'coffer:%s\n' "$password" >"$coffer/nats.user"
fi
[[ -s $coffer/operator.token ]] || printf 'cop_%s\n' "$(openssl rand -hex 32)" >"$coffer/operator.token"

for dir in "$vault" "$coffer"; do
  cp "$authority/ca.pem" "$dir/ca.pem"
  chmod 644 "$dir/ca.pem"
done
[[ -z ${COFFER_UID:-} ]] || chown -R "$COFFER_UID" "$coffer"
[[ -z ${VAULT_UID:-} ]] || chown -R "$VAULT_UID" "$vault"
