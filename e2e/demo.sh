#!/usr/bin/env bash
# A three-node cluster in namespaces with Plat installed from its chart, and six pods to look at.
#
#   demo.sh up      starts it (fresh, if one is up already) and shows it
#   demo.sh down    removes it
. "$(dirname "$0")/testbed/lib/box.sh"
need_root
begin=$(now_ms)

title() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# progress WHAT COMMAND...: runs the command and says every five seconds what it still waits for.
progress() {
  local what=$1 start=$SECONDS next=5; shift
  "$@" & working=$!
  while kill -0 "$working" 2>/dev/null; do
    if ((SECONDS - start >= next)); then say "$what ... $((SECONDS - start)) s"; next=$((next + 5)); fi
    sleep 0.1
  done
  wait "$working" || failed "$what"
}

interrupted() {
  trap - INT TERM
  [[ -z ${working:-} ]] || { kill "$working" 2>/dev/null; wait "$working" || true; }
  "$TESTBED/down.sh"
  exit 130
}

failed() {
  say "the demo failed at: $1"
  k get nodes,podcidrs,nodenetworks,pods -A -o wide >&2 || true
  k -n plat-system logs --prefix --tail=20 -l app.kubernetes.io/name=plat >&2 || true
  say "it is left as it is; logs are in $TB_RUN; remove it with: make demo-down"
  exit 1
}

install_plat() {
  in_cluster helm --kubeconfig "$TB_RUN/admin.kubeconfig" install plat "$REPO/charts/plat" \
    -n plat-system --create-namespace >"$TB_RUN/helm.log"
}

deploy_pods() {
  k apply -f - >/dev/null <<Y
apiVersion: apps/v1
kind: Deployment
metadata: {name: demo, namespace: default}
spec:
  replicas: 6
  selector: {matchLabels: {app: demo}}
  template:
    metadata: {labels: {app: demo}}
    spec:
      terminationGracePeriodSeconds: 0
      topologySpreadConstraints:
        - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: demo}}}
      containers:
        - {name: probe, image: "localhost/plat-test:1", imagePullPolicy: Never, command: [probe, serve, "8080"],
           readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: demo, namespace: default}
spec: {selector: {app: demo}, ports: [{port: 80, targetPort: 8080}]}
Y
}

# matrix: a row per pod: who it reaches, and as whom the server outside the cluster sees it.
matrix() {
  local pods service row name ip node answers column
  pods=$(k get pods -l app=demo -o json | jq -r '.items | sort_by(.spec.nodeName, .status.podIP)[] | "\(.metadata.name) \(.status.podIP) \(.spec.nodeName)"')
  service=$(k get service demo -o jsonpath='{.spec.clusterIP}')
  printf '%-22s' 'from \ to'
  while read -r name ip node; do printf '%-13s' "$ip"; done <<<"$pods"
  printf '%-10s%s\n' Service 'outside, seen as'
  local all=0 good=0 targets=()
  while read -r name ip node; do targets+=("$ip:8080"); done <<<"$pods"
  while read -r name ip node; do
    answers=$(k exec "$name" -- probe reach "${targets[@]}" "$service:80" "$OUTSIDE4:8080" 2>/dev/null </dev/null || true)
    printf '%-22s' "$ip ($node)"
    row=$(jq -r --arg own "$ip" --arg outside "$OUTSIDE4:8080" --arg service "$service:80" '
      if .seen == null then "fails"
      elif .server == $outside then .seen.client
      elif .server == $service or .seen.client == $own then "ok"
      else "as " + .seen.client end' <<<"$answers")
    local i=0 last=$((${#targets[@]} + 1))
    while read -r column; do
      all=$((all + 1))
      if ((i == last)); then
        printf '%s\n' "$column"
        [[ $column == "$(node_ip4 "${node#n}")" ]] && good=$((good + 1))
      else
        if ((i == last - 1)); then printf '%-10s' "$column"; else printf '%-13s' "$column"; fi
        [[ $column == ok ]] && good=$((good + 1))
      fi
      i=$((i + 1))
    done <<<"$row"
  done <<<"$pods"
  echo "$good of $all as they should be: pods see each other's own address, the outside sees the node's."
  ((good == all && all == 6 * 8))
}

up() {
  trap interrupted INT TERM
  if [[ -e /run/netns/$TB-cp ]]; then say "removing the demo that is still up"; "$TESTBED/down.sh"; fi
  [[ -x $PLAT_TOOLS/kubelet ]] || die "the Kubernetes programs are missing; run: make setup"
  [[ -e $PLAT_IMAGES/plat-agent.tar && -e $PLAT_IMAGES/plat-operator.tar ]] || die "Plat's images are missing; run: make images"
  say "starting etcd, API server, controllers and $NODES nodes"
  progress "starting the cluster" "$TESTBED/up.sh"
  say "helm install plat charts/plat -n plat-system --create-namespace"
  progress "installing Plat" install_plat
  deploy_pods
  progress "waiting for the nodes to be Ready" wait_for 60 k wait --for=condition=Ready node --all --timeout=1s
  progress "waiting for six pods" wait_for 60 k rollout status deployment/demo --timeout=1s
  progress "waiting for the blocks to be Ready" wait_for 60 k wait --for=condition=Ready podcidr --all --timeout=1s
  daemon_start cp outside "$PLAT_IMAGES/bin/probe" serve 8080

  title "kubectl get nodes"; k get nodes
  title "kubectl get podcidrs"; k get podcidrs
  title "kubectl get pods -o wide"; k get pods -o wide | awk '{print $1, $2, $3, $4, $5, $6, $7}' | column -t
  title "Who reaches whom"; matrix || failed "the reachability matrix"
  title "How to go on"
  local name=; [[ $TB == plat ]] || name="TB=$TB "
  cat <<H
  The cluster is up after $(since "$begin"). It is called '$TB' and touches nothing of this machine's own network.
    $name$TESTBED/kubectl.sh get podcidrs -o wide
    $name$TESTBED/kubectl.sh explain podcidr.spec.routing
    $name$TESTBED/node.sh run 1 ip route                 # a shell line on node n1: node.sh run 1 bash
    $name$TESTBED/node.sh add 4                          # a fourth node joins
    ${name}make demo-down                                  # remove it all
H
}

case ${1:-} in
  up) up ;;
  down) "$TESTBED/down.sh" ;;
  *) die "usage: demo.sh up | down" ;;
esac
