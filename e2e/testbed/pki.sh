#!/usr/bin/env bash
# Keys of one cluster: a CA, the API server's two certificates, the key that signs service account tokens,
# and a token per component. Components prove themselves by token: fewer keys to make, same rights.
#
#   pki.sh        makes what is missing under <run>/pki, and the kubeconfigs
. "$(dirname "$0")/lib/box.sh"
need_root
cgroup_step
pki=$TB_RUN/pki
mkdir -p "$pki"

# sign NAME SUBJECT EXTENSIONS
sign() {
  openssl ecparam -genkey -name prime256v1 -noout -out "$1.key"
  openssl req -new -key "$1.key" -subj "$2" |
    openssl x509 -req -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -extfile <(echo "$3") -out "$1.crt" 2>/dev/null
}

keys() {
  cd "$pki"
  openssl ecparam -genkey -name prime256v1 -noout -out ca.key
  openssl req -x509 -new -key ca.key -subj /CN=testbed-ca -days 3650 -out ca.crt
  sign apiserver /CN=kube-apiserver "extendedKeyUsage=serverAuth
subjectAltName=IP:$CP4,IP:$CP6,IP:127.0.0.1,IP:10.96.0.1,IP:fd00:96::1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc"
  sign kubelet-client /O=kubeadm:cluster-admins/CN=apiserver-kubelet "extendedKeyUsage=clientAuth"
  openssl ecparam -genkey -name prime256v1 -noout -out sa.key
  cd - >/dev/null
}

# tokens: token, user, uid, groups. The tokens are worth nothing outside this cluster's namespaces.
tokens() {
  echo "admin-$TB,admin,admin,\"system:masters\""
  echo "kcm-$TB,system:kube-controller-manager,kcm"
  echo "scheduler-$TB,system:kube-scheduler,scheduler"
  echo "proxy-$TB,system:kube-proxy,proxy"
  local i
  for i in $(seq 1 64); do echo "node-$TB-n$i,system:node:n$i,n$i,\"system:nodes\""; done
}

# kubeconfig NAME TOKEN
kubeconfig() {
  cat >"$TB_RUN/$1.kubeconfig" <<K
apiVersion: v1
kind: Config
clusters: [{name: $TB, cluster: {server: "$API", certificate-authority-data: $(base64 -w0 <"$pki/ca.crt")}}]
users: [{name: $1, user: {token: "$2"}}]
contexts: [{name: $TB, context: {cluster: $TB, user: $1}}]
current-context: $TB
K
}

[[ -s $pki/sa.key ]] || keys
tokens >"$pki/tokens.csv"
for who in admin kcm scheduler proxy; do kubeconfig $who "$who-$TB"; done
for i in $(seq 1 64); do kubeconfig "n$i" "node-$TB-n$i"; done
