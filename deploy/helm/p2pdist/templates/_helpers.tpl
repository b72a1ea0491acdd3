{{- define "p2pdist.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- /* Of one part: (list . "agent"). */}}
{{- define "p2pdist.selector" -}}
app.kubernetes.io/name: {{ (index . 0).Chart.Name }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "p2pdist.labels" -}}
{{ include "p2pdist.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end }}

{{- define "p2pdist.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* Whether each scheduler has a name, and perhaps a volume, of its own. */}}
{{- define "p2pdist.stateful" -}}
{{- if or (gt (int .Values.scheduler.replicas) 1) (eq .Values.identity.mode "join") }}yes{{ end }}
{{- end }}

{{- /* What agents and schedulers take from a PKI of one's own. */}}
{{- define "p2pdist.certificates" -}}
- name: P2PDIST_CA_FILE
  value: /run/secrets/p2pdist-identity/ca.crt
- name: P2PDIST_CERT_FILE
  value: /run/secrets/p2pdist-identity/tls.crt
- name: P2PDIST_KEY_FILE
  value: /run/secrets/p2pdist-identity/tls.key
{{- end }}

{{- /* Where agents find the schedulers. */}}
{{- define "p2pdist.schedulers" -}}
{{- $name := include "p2pdist.fullname" . }}
{{- $rest := printf "%s.svc:%v" .Release.Namespace .Values.scheduler.ports.agents }}
{{- if include "p2pdist.stateful" . }}
{{- range $number := until (int .Values.scheduler.replicas) }}
{{- if $number }},{{ end }}{{ $name }}-scheduler-{{ $number }}.{{ $name }}-schedulers.{{ $rest }}
{{- end }}
{{- else }}{{ $name }}-scheduler.{{ $rest }}{{ end }}
{{- end }}

{{- define "p2pdist.checked" -}}
{{- if and (not .Values.scheduler.enabled) (not .Values.agent.mdns) }}
{{- fail "agents find each other by a scheduler or by mDNS: set scheduler.enabled or agent.mdns" }}
{{- end }}
{{- if and .Values.agent.mdns (not .Values.agent.hostNetwork) }}
{{- fail "mDNS does not leave a pod's network: set agent.hostNetwork, or use the scheduler and not agent.mdns" }}
{{- end }}
{{- include "p2pdist.checkedIdentity" . }}
{{- if and .Values.metrics.serviceMonitor.enabled (not .Values.metrics.enabled) }}
{{- fail "metrics.serviceMonitor needs metrics.enabled" }}
{{- end }}
{{- end }}

{{- define "p2pdist.checkedIdentity" -}}
{{- $join := .Values.identity.join }}
{{- $pki := .Values.identity.certificates }}
{{- if eq .Values.identity.mode "join" }}
{{- if not .Values.scheduler.enabled }}
{{- fail "identity.mode join: agents join at a scheduler: set scheduler.enabled, or use certificates of your own" }}
{{- end }}
{{- if not (and $join.caSecretName $join.tokenSecretName) }}
{{- fail "identity.mode join needs identity.join.caSecretName and identity.join.tokenSecretName" }}
{{- end }}
{{- end }}
{{- if eq .Values.identity.mode "certificates" }}
{{- if and .Values.scheduler.enabled (not $pki.schedulerSecretName) }}
{{- fail "identity.mode certificates needs identity.certificates.schedulerSecretName" }}
{{- end }}
{{- if eq (empty $pki.agent.hostPath) (empty $pki.agent.csi.driver) }}
{{- fail "identity.mode certificates needs one of identity.certificates.agent.hostPath and agent.csi.driver" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "p2pdist.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
