#!/usr/bin/env bash
# A real SLURM on this one machine, for trying `dnt submit` and for the tests: slurmctld, one slurmd a node, and for
# sacct slurmdbd with a MariaDB of its own. No systemd, no containers; everything listens on 127.0.0.1 only.
# `dnt sandbox` runs it (cluster/sandbox.py) and --help there explains the options:
#   sandbox.sh up NODES CPUS GPUS ACCOUNTING PREEMPT_SIGNAL | down WIPE | status | kill-node NODE | start-node NODE
# Exit status: 0 done; 1 something failed (for status: it does not run); 2 refused, and nothing was changed.
set -Eeuo pipefail
trap 'echo "error: $BASH_COMMAND failed (${BASH_SOURCE##*/}, line $LINENO)" >&2' ERR
umask 022
export LC_ALL=C PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

BASE=/var/lib/dnt-sandbox   # state, logs, pid files, the daemons' configuration
CONF=/etc/slurm/slurm.conf  # where SLURM's commands look for theirs
MARK='# made by `dnt sandbox up`; changes are lost'
FIRST_PORT=17000            # node N listens on FIRST_PORT + N
MOST_NODES=64
HERE=(--ns $$ --nslist pid) # for pgrep: no processes of containers
STARTED=${EPOCHREALTIME/./} # microseconds

refuse() { echo "error: $*" >&2; exit 2; }
fail() { echo "error: $*" >&2; exit 1; }
say() {
  local tenths=$(((${EPOCHREALTIME/./} - STARTED) / 100000))
  printf '[%3d.%d s] %s\n' $((tenths / 10)) $((tenths % 10)) "$*" >&2
}

is() { # is PID NAME: a live process of that name, and no zombie
  local stat
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null && [[ "$stat" == "$1 ($2) "[!Z]* ]]
}

alive() { # alive PIDFILE NAME
  local pid
  { read -r pid <"$1"; } 2>/dev/null && is "$pid" "$2"
}

wait_for() { # wait_for SECONDS WHAT LOG COMMAND...
  local until=$((SECONDS + $1)) what=$2 log=$3
  shift 3
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $until ] || fail "$what did not come up in time; $log says why"
    sleep 0.1
  done
}

# A machine of somebody's cluster stays as it is: anything here that we did not make ends every command.
check_ours() {
  local file pid
  for file in /etc/slurm/{slurm,slurmdbd,gres,cgroup}.conf; do
    [ ! -r "$file" ] || [ "$(head -n 1 "$file")" = "$MARK" ] ||
      refuse "$file is of another SLURM; dnt sandbox only touches its own: use a machine that is in no cluster"
  done
  [[ "${SLURM_CONF:-$CONF}" == @("$CONF"|"$BASE"/*) ]] ||
    refuse "SLURM_CONF=$SLURM_CONF is of another SLURM; dnt sandbox only touches its own: unset it to try the sandbox"
  [ ! -e /run/slurm/conf ] || refuse "/run/slurm/conf: this machine gets its configuration from another SLURM"
  for pid in $(pgrep "${HERE[@]}" -x 'slurm.{0,3}d' || true); do
    case $(readlink "/proc/$pid/cwd" || echo gone) in
      gone | "$BASE"/*) ;;
      *) refuse "$(<"/proc/$pid/comm") (process $pid) is of another SLURM; dnt sandbox only touches its own" ;;
    esac
  done
}

daemon() { # daemon HOSTNAME COMMAND...: in a UTS namespace, so with a hostname of its own; nothing of our environment
  local name=$1
  shift
  env -i PATH="$PATH" SLURM_CONF="$BASE/conf/slurm.conf" unshare --uts sh -c 'hostname "$0" && exec "$@"' "$name" "$@" \
    </dev/null >"$BASE/log/start.log" 2>&1 || fail "$* does not start; the newest file in $BASE/log says why"
}

# --- up -------------------------------------------------------------------------------------------------------------

up() {
  NODES=$1 CPUS=$2 GPUS=$3 ACCOUNTING=$4 PREEMPT_SIGNAL=$5
  unshare --uts true 2>/dev/null || refuse "this container may not give a process a hostname; run it with --privileged"
  install_packages
  mkdir -p "${CONF%/*}" "$BASE"/{conf,log,run,dev}
  install -d -m 700 "$BASE/state"
  name_nodes
  start_munge
  configure
  [ "$ACCOUNTING" = 0 ] || start_accounting
  alive "$BASE/run/slurmctld.pid" slurmctld || daemon localhost slurmctld
  wait_for 30 slurmctld "$BASE/log/slurmctld.log" sh -c 'scontrol ping | grep -q UP'
  say "controller ready"
  local n
  for n in $(seq "$NODES"); do start_slurmd "node$n"; done
  for n in $(seq "$NODES"); do wait_node "node$n"; done
  printf '%s\n' "$@" >"$BASE/run/options"
  say "$NODES nodes ready"
}

install_packages() {
  local needs=(munged:munge slurmctld:slurmctld slurmd:slurmd srun:slurm-client) missing=() need log
  # of MariaDB only the programs: mariadb-server is a service with a database of its own
  [ "$ACCOUNTING" = 0 ] || needs+=(slurmdbd:slurmdbd mariadbd:mariadb-server-core my_print_defaults:mariadb-client-core)
  for need in "${needs[@]}"; do command -v "${need%:*}" >/dev/null || missing+=("${need#*:}"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || refuse "no ${missing[*]} here, and no apt-get to install it; use Debian or Ubuntu"
  say "installing ${missing[*]}"
  log=$(mktemp) POLICY=/usr/sbin/policy-rc.d
  # keep the packages from starting daemons of their own
  if [ ! -e $POLICY ]; then
    trap 'rm -f $POLICY' EXIT
    printf '#!/bin/sh\nexit 101\n' >$POLICY && chmod 755 $POLICY
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >"$log" 2>&1 || { tail -n 5 "$log" >&2; fail "apt-get update failed (above)"; }
  # Ubuntu 22.04 has these only under names with a version
  apt-cache show mariadb-server-core >/dev/null 2>&1 || missing=("${missing[@]/mariadb-*-core/mariadb-server}")
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$log" 2>&1 ||
    { tail -n 5 "$log" >&2; fail "apt-get install ${missing[*]} failed (above)"; }
  rm -f "$log"
  [ ! -d /run/systemd/system ] || systemctl disable -q slurmctld slurmd slurmdbd 2>/dev/null || true # nor at boot
  say "installed"
}

name_nodes() { # node1 and so on are 127.0.0.1
  grep -qxF "$MARK" /etc/hosts || { echo "$MARK"; seq -f '127.0.0.1 node%g' $MOST_NODES; echo "$MARK"; } >>/etc/hosts
}

start_munge() {
  if ! munge -n 2>/dev/null | unmunge >/dev/null 2>&1; then
    install -d -o munge -g munge -m 700 /etc/munge /var/log/munge
    install -d -o munge -g munge -m 755 /run/munge
    install -d -o munge -g munge -m 711 /var/lib/munge
    if [ ! -s /etc/munge/munge.key ]; then
      (umask 077 && head -c 128 /dev/urandom >/etc/munge/munge.key)
      chown munge:munge /etc/munge/munge.key
    fi
    runuser -u munge -- env -i PATH="$PATH" munged --force --pid-file=/run/munge/munged.pid </dev/null >/dev/null 2>&1
    wait_for 10 munge /var/log/munge/munged.log sh -c 'munge -n | unmunge'
    cp /run/munge/munged.pid "$BASE/run/munged.pid" # ours, to be stopped by `down`
  fi
  say "munge ready"
}

# Writes the configuration; where it differs from what SLURM runs with, stops SLURM. Jobs live on.
configure() {
  local n g new
  new=$(mktemp -d)
  for g in $(seq 0 $((GPUS - 1))); do # a GPU must be a device: these are /dev/null
    [ -c "$BASE/dev/gpu$g" ] || mknod "$BASE/dev/gpu$g" c 1 3
  done
  { echo "AutoDetect=off"
    [ "$GPUS" = 0 ] || echo "NodeName=node[1-$NODES] Name=gpu File=$BASE/dev/gpu[0-$((GPUS - 1))]"
  } >"$new/gres.conf"
  # No cgroup is used. Unless told so, slurmd makes one where it finds version 2, and dies where it may not.
  case $(slurmd -V) in
    *\ 2[0-3].*) echo "CgroupPlugin=cgroup/v1" ;; # makes none before one is asked for
    *) echo "CgroupPlugin=disabled" ;;
  esac >"$new/cgroup.conf"
  # The daemons listen where their hostname leads, so on 127.0.0.1; commands on any address, for the machine's own
  # name may lead to one that the daemons do not answer to.
  printf '%s\n' "Include $CONF" "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny" >"$new/slurm.conf"
  { cat <<C
$MARK
ClusterName=sandbox
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
ReturnToService=2
MailProg=/bin/true
SlurmdParameters=config_overrides
StateSaveLocation=$BASE/state
SlurmdSpoolDir=$BASE/spool.%n
SlurmctldPidFile=$BASE/run/slurmctld.pid
SlurmdPidFile=$BASE/run/%n.pid
SlurmctldLogFile=$BASE/log/slurmctld.log
SlurmdLogFile=$BASE/log/%n.log

# quicker than a site's defaults, to try faults without long waits
# how long a requeued job is held back; 120 by default
AuthInfo=cred_expire=10
KillWait=5
SlurmdTimeout=15
SchedulerParameters=bf_interval=2,sched_interval=5

JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
C
    # a job that is preempted gets its --signal first; a site's default is SIGTERM alone
    [ "$PREEMPT_SIGNAL" = 0 ] || echo "SlurmctldParameters=preempt_send_user_signal"
    if [ "$ACCOUNTING" = 1 ]; then
      echo "AccountingStorageType=accounting_storage/slurmdbd"
      echo "AccountingStorageHost=127.0.0.1"
      echo "JobAcctGatherType=jobacct_gather/linux"
      [ "$GPUS" = 0 ] || echo "AccountingStorageTRES=gres/gpu"
    fi
    [ "$GPUS" = 0 ] || echo "GresTypes=gpu"
    # all on one address: srun's replies come from 127.0.0.1 whatever the node's
    for n in $(seq "$NODES"); do
      printf 'NodeName=node%d NodeHostname=node%d NodeAddr=127.0.0.1 Port=%d CPUs=%d RealMemory=8000' \
        "$n" "$n" $((FIRST_PORT + n)) "$CPUS"
      [ "$GPUS" = 0 ] && echo || echo " Gres=gpu:$GPUS"
    done
    cat <<C
PartitionName=DEFAULT Nodes=node[1-$NODES] MaxTime=INFINITE State=UP PreemptMode=OFF
PartitionName=main  PriorityTier=10 Default=YES
PartitionName=short PriorityTier=10 MaxTime=2:00:00 MaxNodes=2
PartitionName=high  PriorityTier=100
# preempted by the others: low's jobs go back into the queue, spot's are over
PartitionName=low   PriorityTier=1 GraceTime=10 PreemptMode=REQUEUE
PartitionName=spot  PriorityTier=1 GraceTime=10 PreemptMode=CANCEL
C
  } >"$new/commands.conf"
  if ! cmp -s "$new/commands.conf" "$CONF" || ! diff -rq --exclude=slurmdbd.conf "$new" "$BASE/conf" >/dev/null; then
    stop_nodes
    stop "$BASE/run/slurmctld.pid" slurmctld
    for n in $(seq $((NODES + 1)) $MOST_NODES); do clear_node "node$n"; done
    cp "$new"/* "$BASE/conf"
    cp "$new/commands.conf" "$CONF"
  fi
  rm -rf "$new"
}

# Once started it runs until `down`, so that it is back at once after `up --no-accounting`.
start_accounting() {
  local socket=$BASE/mysql/socket
  if [ ! -d "$BASE/mysql" ]; then
    rm -rf "$BASE/mysql.new" && install -d -m 700 "$BASE/mysql.new"
    mariadb-install-db --no-defaults --user=root --datadir="$BASE/mysql.new" --skip-test-db --skip-name-resolve --force \
      --auth-root-authentication-method=socket --innodb-log-file-size=16M >"$BASE/log/mariadb-install.log" 2>&1 ||
      fail "mariadb-install-db failed; $BASE/log/mariadb-install.log says why"
    mv "$BASE/mysql.new" "$BASE/mysql"
  fi
  # no port and no password: it knows root by the socket
  alive "$BASE/run/mariadbd.pid" mariadbd ||
    (env -i PATH="$PATH" setsid mariadbd --no-defaults --user=root --datadir="$BASE/mysql" --socket="$socket" \
      --skip-networking --pid-file="$BASE/run/mariadbd.pid" --log-error="$BASE/log/mariadb.log" \
      --innodb-buffer-pool-size=128M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 \
      --innodb-flush-log-at-trx-commit=2 </dev/null >/dev/null 2>&1 &)
  wait_for 60 mariadb "$BASE/log/mariadb.log" alive "$BASE/run/mariadbd.pid" mariadbd
  (umask 077 && cat >"$BASE/conf/slurmdbd.conf" <<C
AuthType=auth/munge
DbdHost=localhost
DbdAddr=127.0.0.1
SlurmUser=root
LogFile=$BASE/log/slurmdbd.log
PidFile=$BASE/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
CommunicationParameters=NoInAddrAny
C
  )
  alive "$BASE/run/slurmdbd.pid" slurmdbd || daemon localhost env MYSQL_UNIX_PORT="$socket" slurmdbd
  wait_for 60 slurmdbd "$BASE/log/slurmdbd.log" sacctmgr -n list cluster
  sacctmgr -n list cluster format=cluster%20 | grep -qw sandbox || sacctmgr -i -Q add cluster sandbox >/dev/null
  say "accounting ready"
}

start_slurmd() {
  mkdir -p "$BASE/spool.$1"
  alive "$BASE/run/$1.pid" slurmd || daemon "$1" slurmd -N "$1"
}

able() { [[ "$(sinfo -h -n "$1" -p main -o %T)" =~ ^(idle|mixed|allocated|completing)$ ]]; }

wait_node() {
  able "$1" || scontrol update nodename="$1" state=resume 2>/dev/null || true
  wait_for 60 "$1" "$BASE/log/$1.log" able "$1"
}

# --- down, one node -------------------------------------------------------------------------------------------------

stop() { # stop PIDFILE NAME
  local pid tries=150
  pid=$(cat "$1" 2>/dev/null) && is "$pid" "$2" || return 0
  kill "$pid" 2>/dev/null || true
  while is "$pid" "$2"; do # its file goes sooner
    tries=$((tries - 1))
    [ $tries -gt 0 ] || kill -9 "$pid" 2>/dev/null || true
    sleep 0.1
  done
}

stop_nodes() { # all at once, for each takes its time
  local file
  for file in "$BASE"/run/node*.pid; do stop "$file" slurmd & done
  wait
}

# A node is the UTS namespace of its slurmd, and those of earlier ones that the daemons of job steps are still in.
node_spaces() {
  local pid
  for pid in $(pgrep "${HERE[@]}" -x 'slurm(step)?d' || true); do
    [[ "$(readlink "/proc/$pid/cwd")" == "$BASE"/* ]] || continue
    [ "$(nsenter --target "$pid" --uts uname -n)" != "$1" ] || stat -L -c %i "/proc/$pid/ns/uts" || true
  done 2>/dev/null # processes end meanwhile
}

kill_node() { # all processes of the node with SIGKILL
  local spaces pids killed=0
  spaces=" $(node_spaces "$1" | sort -u | tr '\n' ' ')"
  [[ "$spaces" != *" $(stat -L -c %i /proc/self/ns/uts) "* ]] || refuse "this runs on $1 itself; run it outside of jobs"
  for _ in {1..50}; do
    pids=$(ps -eo utsns=,pid= | awk -v spaces="$spaces" 'index(spaces, " " $1 " ") {print $2}')
    [ -n "$pids" ] || break
    killed=$((killed + $(kill -9 $pids 2>/dev/null || true; wc -w <<<"$pids")))
    sleep 0.1
  done
  say "$1: $killed processes killed"
}

clear_node() { # one that has stopped: what jobs have left there
  [ ! -d "$BASE/spool.$1" ] || { kill_node "$1" 2>/dev/null && rm -rf "$BASE/spool.$1"; }
}

down() {
  local jobs tries=200 n
  if alive "$BASE/run/slurmctld.pid" slurmctld; then
    jobs=$(squeue -h -o %A | sort -u)
    [ -z "$jobs" ] || { say "cancelling jobs" $jobs; scancel $jobs; }
    while [ -n "$(squeue -h)" ] && [ $tries -gt 0 ]; do tries=$((tries - 1)); sleep 0.1; done
  fi
  stop_nodes
  for n in $(seq $MOST_NODES); do clear_node "node$n"; done
  stop "$BASE/run/slurmctld.pid" slurmctld
  stop "$BASE/run/slurmdbd.pid" slurmdbd
  stop "$BASE/run/mariadbd.pid" mariadbd
  stop "$BASE/run/munged.pid" munged
  rm -f "$BASE/run/options"
  [ "$1" = 0 ] || wipe
  say "stopped"
}

wipe() {
  rm -rf "$BASE" "$CONF"
  local rest
  rest=$(awk -v mark="$MARK" '$0 == mark {inside = !inside; next} !inside' /etc/hosts)
  printf '%s\n' "$rest" >/etc/hosts # in place: a container's /etc/hosts cannot be replaced
}

check_node() {
  running || refuse "the sandbox does not run; start it with dnt sandbox up"
  [[ "$1" =~ ^node[1-9][0-9]*$ ]] && [ "${1#node}" -le "$(head -n 1 "$BASE/run/options")" ] ||
    refuse "$1: no such node; there are" $(sinfo -h -N -p main -o %N)
}

running() { [ -s "$BASE/run/options" ] && alive "$BASE/run/slurmctld.pid" slurmctld; }

# --- status ---------------------------------------------------------------------------------------------------------

status() {
  local options
  mapfile -t options <"$BASE/run/options"
  echo "SLURM $(sinfo --version | cut -d' ' -f2), started by dnt sandbox up; logs in $BASE/log"
  [ "${options[3]}" = 1 ] && echo "accounting: on, sacct works" || echo "accounting: off, there is no sacct"
  [ "${options[4]}" = 1 ] && echo "preempted jobs get: their --signal, then SIGTERM" || echo "preempted jobs get: SIGTERM"
  echo
  sinfo -N -p main -o '%8N %10T %5c %8m %G'
  echo
  sinfo -s -o '%10P %12l %6D %N'
  echo
  echo "jobs: $(squeue -h | wc -l)"
  echo "try:  srun --nodes=2 hostname"
}

# --------------------------------------------------------------------------------------------------------------------

check_ours
command=$1
shift
if [ "$command" != status ] && [ -z "${SANDBOX_LOCKED:-}" ]; then # one at a time; --close: daemons do not inherit it
  SANDBOX_LOCKED=1 exec flock --close /run/dnt-sandbox.lock "$BASH" "$0" "$command" "$@"
fi
case $command in
  up) up "$@" ;;
  down) down "$@" ;;
  status)
    running || { echo "not running; start it with: dnt sandbox up"; exit 1; }
    shown=$(status)
    echo "$shown"
    ;;
  kill-node) check_node "$1"; kill_node "$1" ;;
  start-node) check_node "$1"; start_slurmd "$1"; wait_node "$1"; say "$1 ready" ;;
esac
