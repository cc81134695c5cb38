{{- define "thumbwheel.fullname" -}}
{{- $name := .Release.Name -}}
{{- if not (contains .Chart.Name $name) }}{{ $name = printf "%s-%s" $name .Chart.Name }}{{ end -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* The labels below take a dict of `root` (the top scope) and `component`. */ -}}
{{- define "thumbwheel.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "thumbwheel.labels" -}}
{{ include "thumbwheel.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "thumbwheel.image" -}}
{{- with .root.Values.image }}{{ .prefix }}{{ $.target }}:{{ .tag | default $.root.Chart.AppVersion }}{{ end -}}
{{- end -}}

{{- /* Whether the log is Kafka: empty where it is not. */ -}}
{{- define "thumbwheel.kafka" -}}
{{- if eq "kafka" (((.Values.settings).log).backend | default "sqlite") }}true{{ end -}}
{{- end -}}

{{- /* thumbwheel.toml: the user's settings, and what the chart decides. values.schema.json refuses the latter in the former. */ -}}
{{- define "thumbwheel.toml" -}}
{{- $log := dict "path" "/var/lib/thumbwheel/log/log.sqlite" -}}
{{- if include "thumbwheel.kafka" . }}
{{- $kafka := dict -}}
{{- if .Values.kafka.passwordSecret }}
{{- $kafka = merge $kafka (dict "password_file" "/etc/thumbwheel-kafka/password") -}}
{{- end }}
{{- if .Values.kafka.tlsSecret }}
{{- $kafka = merge $kafka (dict "ca_file" "/etc/thumbwheel-kafka-tls/ca.crt") -}}
{{- end }}
{{- if .Values.kafka.clientCertificate }}
{{- $kafka = merge $kafka (dict
  "certificate_file" "/etc/thumbwheel-kafka-tls/tls.crt"
  "key_file" "/etc/thumbwheel-kafka-tls/tls.key")
-}}
{{- end }}
{{- $log = dict
  "outbox" "/var/lib/thumbwheel/outbox/outbox.sqlite"
  "mirror" "/var/lib/thumbwheel/outbox/mirror.sqlite"
  "forwarder_metrics_port" 8104
  "kafka" $kafka
-}}
{{- end }}
{{- $own := dict
  "data" "/var/lib/thumbwheel/data"
  "log" $log
  "store" (dict "path" "/var/lib/thumbwheel/adapters")
  "engine" (dict "model" (printf "/model/%s" .Values.model.path | trimSuffix "/"))
  "gateway" (dict "host" "0.0.0.0" "port" 8100 "keys" "/etc/thumbwheel-keys/keys.json")
  "learner" (dict "metrics_port" 8101 "device" (ternary "cuda" "cpu" (gt (int .Values.learner.gpus) 0)))
  "guardrails" (dict
    "metrics_port" 8102
    "gateway" (printf "http://%s-gateway:%d" (include "thumbwheel.fullname" .) (int .Values.gateway.service.port))
    "key_file" "/etc/thumbwheel-keys/evaluator.key")
  "deploy" (dict "metrics_port" 8103)
-}}
{{- toToml (mustMergeOverwrite (deepCopy .Values.settings) $own) -}}
{{- end -}}

{{- /* What every pod has in common; a dict of `root` and `component`. */ -}}
{{- define "thumbwheel.pod" -}}
serviceAccountName: {{ include "thumbwheel.fullname" .root }}-{{ .component }}
# Nobody here talks to the Kubernetes API.
automountServiceAccountToken: false
# Kubernetes would put THUMBWHEEL_… variables of its own beside those that override settings.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if not (include "thumbwheel.kafka" .root) }}
affinity:
  podAffinity:
    # The log is a SQLite file: one node for all. The first gateway chooses it, since it is the one that needs the GPU;
    # the others wait for a gateway, and a gateway that is started again comes to where the others are.
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels: {{- include "thumbwheel.selector" (dict "root" .root "component" (ternary "" "gateway" (eq .component "gateway"))) | nindent 12 }}
{{- end }}
{{- end -}}

{{- /* The container's part that is the same in every program; a dict of `root` and `target`. */ -}}
{{- define "thumbwheel.container" -}}
image: {{ include "thumbwheel.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{- /* A dict of `root` and `component`. */ -}}
{{- define "thumbwheel.env" -}}
- {name: THUMBWHEEL_CONFIG, value: /etc/thumbwheel/thumbwheel.toml}
# Caches of the libraries: the root file system is read-only, and nothing is fetched at run time.
- {name: HOME, value: /var/lib/thumbwheel/data}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- if include "thumbwheel.kafka" .root }}
# A name that stays: a program that is started again is the same member of its group, and no partition moves.
- name: THUMBWHEEL_LOG__KAFKA__MEMBER
  {{- if eq .component "gateway" }}
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
  {{- else }}
  value: {{ .component }}
  {{- end }}
{{- end }}
{{- end -}}

{{- /* Where the log is, or the way to it: mounts and volumes; a dict of `root` and `component`. */ -}}
{{- define "thumbwheel.logMounts" -}}
{{- if include "thumbwheel.kafka" .root }}
{{- if eq .component "gateway" }}
- {name: outbox, mountPath: /var/lib/thumbwheel/outbox}
{{- end }}
{{- if .root.Values.kafka.passwordSecret }}
- {name: kafka-password, mountPath: /etc/thumbwheel-kafka, readOnly: true}
{{- end }}
{{- if .root.Values.kafka.tlsSecret }}
- {name: kafka-tls, mountPath: /etc/thumbwheel-kafka-tls, readOnly: true}
{{- end }}
{{- else }}
- {name: log, mountPath: /var/lib/thumbwheel/log}
{{- end }}
{{- end -}}

{{- define "thumbwheel.logVolumes" -}}
{{- if include "thumbwheel.kafka" .root }}
{{- with .root.Values.kafka.passwordSecret }}
- name: kafka-password
  secret: {secretName: {{ . }}, defaultMode: 0440, items: [{key: password, path: password}]}
{{- end }}
{{- with .root.Values.kafka.tlsSecret }}
- name: kafka-tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items:
      - {key: ca.crt, path: ca.crt}
      {{- if $.root.Values.kafka.clientCertificate }}
      - {key: tls.crt, path: tls.crt}
      - {key: tls.key, path: tls.key}
      {{- end }}
{{- end }}
{{- else }}
- {name: log, persistentVolumeClaim: {claimName: {{ include "thumbwheel.fullname" .root }}-log}}
{{- end }}
{{- end -}}

{{- /* To the brokers, and to the names of them. */ -}}
{{- define "thumbwheel.kafkaEgress" -}}
{{- $ports := .Values.networkPolicy.kafkaPorts -}}
{{- if not $ports }}
{{- range splitList "," .Values.settings.log.kafka.bootstrap }}
{{- $ports = append $ports (regexFind "[0-9]+$" (trim .)) -}}
{{- end }}
{{- end -}}
- ports:
    {{- range uniq $ports }}
    - port: {{ . }}
    {{- end }}
  {{- with .Values.networkPolicy.kafkaTo }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "thumbwheel.dnsEgress" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end -}}

{{- /* A daemon serves /metrics for as long as it runs; a slow answer is a busy one. */ -}}
{{- define "thumbwheel.probes" -}}
readinessProbe:
  httpGet: {path: /metrics, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 10
livenessProbe:
  httpGet: {path: /metrics, port: metrics}
  periodSeconds: 30
  timeoutSeconds: 20
  failureThreshold: 10
{{- end -}}

{{- define "thumbwheel.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if .gpus }}
{{- $_ := set $resources "limits" (merge (dict .root.Values.gpuResource .gpus) ($resources.limits | default dict)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
